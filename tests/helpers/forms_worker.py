"""The cases of tests/distributed/test_gathered_forms.py, run by the processes of one process group.

Each case returns results of its process. The expected values are those of the dense reference with the whole
batch, which process 0 computes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.cases import LOSSES as WITH_LABELS
from helpers.contrast_forms import MEMORY, OPTIONS, TEMPERATURE, B, build
from pysupcon import functional
from pysupcon.distributed import AllGather, Ring

MODES = {"all": AllGather, "ring": Ring}
LOSSES = {**WITH_LABELS, "infonce": functional.info_nce}
SIZES = {
    2: ((2, 4), (3, 1), (5, 4)),
    3: ((3, 0, 3), (1, 0, 3), (4, 5, 0)),
}
"""Number of samples, of separate candidates and of memory rows of each process, by number of processes"""
FORMS = {
    **{name: parts for name, parts in OPTIONS.items() if not {"class_balance", "memory"} <= {*parts}},
    "class balance, one": ("class_balance", "one", "candidate_weights"),
    "class balance of candidates": ("class_balance", "candidates", "unlabelled"),
    "unlabelled, one": ("unlabelled", "one", "memory"),
    "everything": tuple(part for part in OPTIONS["everything"] if part != "class_balance"),
}
"""Parts of every form that gather supports, by name"""


def takes(name: str, form: str) -> bool:
    """Whether a loss takes a form: cNCE has no negatives, and InfoNCE no labels."""
    refused = {"cnce": {"hard"}, "infonce": {"class_balance", "ignored", "unlabelled"}}
    return not refused.get(name, set()) & {*FORMS[form]}


def _part(given: dict[str, Any], own_memory: bool) -> dict[str, Any]:
    """The arguments of this process. The memory is that of all processes, or a part of it."""
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    samples, candidates, memory = (slice(sum(side[:rank]), sum(side[: rank + 1])) for side in sizes)
    parts = {
        name: samples for name in ("features", "labels", "instances", "hard_negatives", "anchor_weights")
    }
    parts |= {name: candidates for name in ("candidates", "candidate_labels", "candidate_instances")}
    parts["candidate_weights"] = candidates if "candidates" in given else samples
    if own_memory:
        parts |= {name: memory for name in given if name.startswith("memory")}
    return {name: value[parts[name]] if name in parts else value for name, value in given.items()}


def _arguments(name: str, form: str) -> dict[str, Any]:
    torch.manual_seed(5)
    x, given = build(FORMS[form])
    if name == "infonce":
        given = {key: value for key, value in given.items() if not key.endswith("labels")}
    return {"features": x, **given}


def _step(loss: Any, given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Losses, and leaves: temperature, features, candidates and hard negatives."""
    names = [name for name in ("features", "candidates", "hard_negatives") if name in given]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    value = loss(**{**given, **leaves}, temperature=temperature)
    return value, [temperature, *leaves.values()]


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def forms(name: str, mode: str, form: str, reduction: str, backend: str) -> dict[str, list[Tensor]]:
    """Loss and gradients of this process, and those of one process with the whole batch."""
    loss, given = LOSSES[name], _arguments(name, form)
    options = {"gather": MODES[mode](), "backend": backend}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a process without a positive
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        value, leaves = _step(loss, {**_part(given, False), "reduction": reduction, **options})
    results = {"got": _gradients(value, leaves)}
    if not dist.get_rank():
        truth = _step(loss, {**given, "reduction": reduction, "backend": "reference"})
        results["truth"] = _gradients(*truth)
    return results


def own_memory(name: str, mode: str, form: str) -> dict[str, list[Tensor]]:
    """As ``forms``, but each process has a memory of its own. One process with the whole batch computes the
    losses with each of the memories, and those of the anchors of that process count."""
    loss, given = LOSSES[name], _arguments(name, form)
    value, leaves = _step(loss, {**_part(given, True), "reduction": "sum", "gather": MODES[mode]()})
    sizes, truths = SIZES[dist.get_world_size()], []

    def whole(**arguments: Any) -> Tensor:
        for rank in range(dist.get_world_size()):
            samples, _, memory = (slice(sum(side[:rank]), sum(side[: rank + 1])) for side in sizes)
            rows = {key: arguments[key][memory] for key in given if key.startswith("memory")}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # with the memory of one process no anchor may have a loss
                losses = loss(**{**arguments, **rows}, reduction="none", backend="reference")
            truths.append(losses[samples].sum())
        return torch.stack(truths).sum()

    results = {"got": _gradients(value, leaves)}
    if not dist.get_rank():
        results["truth"] = _gradients(*_step(whole, given))
    return results


def statistics(mode: str, form: str) -> dict[str, list[Tensor]]:
    """pair_statistics of this process and the gradients of their sum, and those of one process."""
    given, results = _arguments("supcon", form), {}
    for side, options in (("got", {"gather": MODES[mode]()}), ("truth", {"backend": "reference"})):
        arguments = _part(given, False) if side == "got" else given

        def finite(options: Any = options, **arguments: Any) -> Tensor:
            s = functional.pair_statistics(**arguments, **options)
            return torch.stack([torch.where(value.isfinite(), value, 0.0).double() for value in s], dim=1)

        results[side] = _gradients(*_step(finite, arguments))
    return results


def refused(what: str, mode: str) -> list[str]:
    """Errors of a call that some or all processes refuse, and of a valid call afterwards."""
    last, gather = dist.get_rank() == dist.get_world_size() - 1, MODES[mode]()
    given: dict[str, Any] = {
        "features": torch.randn(B, 4, requires_grad=True),
        "labels": torch.arange(B) % 2,
        "memory": torch.randn(MEMORY, 4),
        "memory_labels": torch.arange(MEMORY) % 2,
    }
    if what == "class balance and memory":
        changed: dict[str, Any] = {"class_balance": True}
    elif last:
        changed = {"memory": given["memory"] * (torch.nan if what == "not finite" else 1e20)}
    else:
        changed = {}
    errors = []
    for arguments in (changed, {}):
        try:
            functional.supcon(**{**given, **arguments}, gather=gather).backward()
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


CASES = {function.__name__: function for function in (forms, own_memory, statistics, refused)}
