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

import pysupcon
from helpers.distributed_worker import CLASSES, MODES, WIDTH, counted
from helpers.distributed_worker import LOSSES as ONE_TOWER
from pysupcon.distributed import AllGather, Ring
from pysupcon.functional import pair_statistics

LOSSES = {**ONE_TOWER, "clip": (pysupcon.InfoNCELoss, {"temperature": 0.2, "symmetric": True})}
SIZES = {
    "equal": ((4, 4, 4), (4, 4, 4)),
    "ragged": ((2, 5, 3), (6, 1, 4)),
    "empty": ((0, 6, 3), (5, 0, 2)),
}
"""Samples of the anchors and of the candidates on each process; matched by position: those of the anchors"""
FORMS = ("labels", "instances", "labels and position", "position", "one view")
"""What defines the positives; "one view": no candidates and ``contrast_mode="one"``"""


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
        if name in ("infonce", "clip"):
            ids = {key: value for key, value in ids.items() if "labels" not in key}
        options |= {"contrast_mode": "one"} if form.endswith("one view") else {}
        criterion: nn.Module = kind(
            **own, learnable_temperature=True, reduction=reduction, **options
        ).double()
        for leaf in leaves:
            leaf.requires_grad_()
        given = dict(zip(("features", "candidates"), leaves, strict=False))
        loss = criterion(**given, **ids)
        if reduction == "none":
            scaled = (weights if whole else weights[batch.own[0]])[: len(loss)]
            (loss * (scaled[:, 0] if form.endswith("one view") else scaled)).sum().backward()
        else:
            loss.backward()
        return [loss.detach(), criterion.log_temperature.grad, *(leaf.grad for leaf in leaves)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a process without a positive
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        warnings.filterwarnings("ignore", message="candidates of shape")  # 3 views, features have 2
        got = step(False, gather=MODES[mode], backend=backend)
    return {"got": got, "truth": step(True, backend="reference")}


class _GatherWithGradient(torch.autograd.Function):
    """All-gathers rows; the gradient of the own rows is the sum of those of all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _open_clip(images: Tensor, texts: Tensor, logit_scale: Tensor, local_loss: bool) -> Tensor:
    """ClipLoss of open_clip with gather_with_grad=True, from its definition."""
    all_images, all_texts = _GatherWithGradient.apply(images), _GatherWithGradient.apply(texts)
    if local_loss:
        per_image, per_text = logit_scale * images @ all_texts.T, logit_scale * texts @ all_images.T
        targets = torch.arange(len(images)) + dist.get_rank() * len(images)
    else:
        per_image = logit_scale * all_images @ all_texts.T
        per_text, targets = per_image.T, torch.arange(len(all_images))
    return (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2


def clip(mode: str, local_loss: bool) -> dict[str, list[Tensor]]:
    """Loss and gradients of images, texts and the logarithm of the temperature, of this process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = F.normalize(torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    criterion = pysupcon.InfoNCELoss(
        0.1, symmetric=True, gather=MODES[mode], learnable_temperature=True
    ).double()
    results: dict[str, list[Tensor]] = {}
    for name in ("got", "truth"):
        images, texts = (side.clone().requires_grad_() for side in rows)
        if name == "got":
            loss = criterion(images, candidates=texts)
        else:
            loss = _open_clip(images, texts, (-criterion.log_temperature).exp(), local_loss)
        criterion.zero_grad()
        loss.backward()
        means = torch.stack([loss.detach(), criterion.log_temperature.grad])
        if not local_loss:  # every process has the loss of the whole batch
            dist.all_reduce(means)
            means /= dist.get_world_size()
        results[name] = [*means, images.grad, texts.grad]
    return results


def tower_traffic(name: str, mode: str, form: str) -> dict[str, list[tuple[str, int, int]]]:
    """Communication of one forward and one backward of 4 samples on each process, call by call.

    Args:
        name: of the loss.
        mode: of MODES.
        form: "candidates", [4, 3, D]; "fixed candidates", which need no gradient; "one view".
    """
    batch = Towers("one view" if form == "one view" else "labels", "equal", torch.float32)
    leaves, ids = batch.arguments(False)
    leaves[0].requires_grad_()
    leaves[-1].requires_grad_(form != "fixed candidates")
    kind, own = LOSSES[name]
    criterion = kind(**own, gather=MODES[mode], contrast_mode="one" if form == "one view" else "all")
    given = dict(zip(("features", "candidates"), leaves, strict=False))
    with counted() as forward:
        loss = criterion(**given, **ids)
    with counted() as backward:
        loss.backward()
    return {"forward": forward, "backward": backward}


def statistics(mode: str) -> dict[str, list[Tensor]]:
    """pair_statistics of this process, with the gradients of both sides of their sum, and those of one
    process with the whole batch."""
    batch = Towers("labels", "ragged", torch.float64)
    results = {}
    gather = {"all": AllGather, "ring": Ring}[mode]()
    for name, options in (("got", {"gather": gather}), ("truth", {"backend": "reference"})):
        (x, c), ids = batch.arguments(name == "truth")
        s = pair_statistics(x.requires_grad_(), candidates=c.requires_grad_(), **ids, **options)
        values = [torch.where(value.isfinite(), value, 0.0) for value in s[:3]]
        torch.stack(values).sum().backward()
        results[name] = [value.detach() for value in values] + [x.grad, c.grad]
    return results


CASES = {function.__name__: function for function in (towers, clip, tower_traffic, statistics)}
