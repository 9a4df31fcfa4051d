"""The cases of tests/distributed/test_two_towers.py, run by the processes of one process group.

Each case returns results of its process. The expected values are those of one process with the whole batch,
which every process computes itself.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.distributed_worker import CLASSES, LOSSES, MODES, WIDTH

SIZES = {
    "equal": ((4, 4, 4), (4, 4, 4)),
    "ragged": ((2, 5, 3), (6, 1, 4)),
    "empty": ((0, 6, 3), (5, 0, 2)),
}
"""Samples of the anchors and of the candidates on each process; matched by position: those of the anchors"""
FORMS = ("labels", "instances", "labels and position", "position", "one view")


class Towers:
    """The rows of both sides of the whole batch, and the parts of this process."""

    def __init__(self, form: str, batches: str, dtype: torch.dtype) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        sizes = [list(side[:world]) for side in SIZES[batches]]
        if "position" in form:
            sizes[1] = sizes[0]
        self.own = [slice(sum(side[:rank]), sum(side[: rank + 1])) for side in sizes]
        generator = torch.Generator().manual_seed(3)
        counts, views = [sum(side) for side in sizes], (2, 3)
        self.rows = [
            F.normalize(torch.randn(count, v, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
            for count, v in zip(counts, views, strict=True)
        ]
        if form == "instances":  # one row per sample
            self.rows = [rows[:, 0] for rows in self.rows]
        self.rows = [rows.to(dtype) for rows in self.rows]
        labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
        labels[0][-1] = CLASSES  # no candidate has this label
        instances = [part * 100 + torch.arange(len(part)) % 3 for part in labels]
        if "position" in form:
            labels[1] = labels[0]
        if form == "one view":
            self.rows = self.rows[:1]
        self.ids: list[dict[str, Tensor]] = [{}, {}]
        for side, prefix in enumerate(("", "candidate_")[: len(self.rows)]):
            if form != "position":
                self.ids[side][prefix + "labels"] = labels[side]
            if form == "instances":
                self.ids[side][prefix + "instances"] = instances[side]

    def arguments(self, whole: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Leaves of both sides, and the ids."""
        parts = [slice(None)] * 2 if whole else self.own
        leaves = [rows[part].clone() for rows, part in zip(self.rows, parts, strict=False)]
        ids = {
            name: part_ids[part]
            for part, side in zip(parts, self.ids, strict=True)
            for name, part_ids in side.items()
        }
        return leaves, ids


def towers(
    name: str, mode: str, form: str, batches: str, dtype: str, reduction: str, backend: str
) -> dict[str, Any]:
    """Returns loss and gradients of both sides and of the temperature: of this process and of one process
    with the whole batch."""
    batch = Towers(form, batches, getattr(torch, dtype))
    kind, own = LOSSES[name]
    weights = torch.rand(batch.rows[0].shape[:-1], generator=torch.Generator().manual_seed(1)) + 0.5

    def step(whole: bool, **options: Any) -> list[Tensor]:
        leaves, ids = batch.arguments(whole)
        if whole:
            leaves = [rows.double() for rows in leaves]
        if name == "infonce":
            ids = {key: value for key, value in ids.items() if "labels" not in key}
        options |= {"contrast_mode": "one"} if form == "one view" else {}
        criterion: nn.Module = kind(
            **own, learnable_temperature=True, reduction=reduction, **options
        ).double()
        for leaf in leaves:
            leaf.requires_grad_()
        given = dict(zip(("features", "candidates"), leaves, strict=False))
        loss = criterion(**given, **ids)
        if reduction == "none":
            scaled = (weights if whole else weights[batch.own[0]])[: len(loss)]
            (loss * (scaled[:, 0] if form == "one view" else scaled)).sum().backward()
        else:
            loss.backward()
        return [loss.detach(), criterion.log_temperature.grad, *(leaf.grad for leaf in leaves)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a process without a positive
        got = step(False, gather=MODES[mode], backend=backend)
    return {"got": got, "truth": step(True, backend="reference")}


CASES = {function.__name__: function for function in (towers,)}
