"""The cases of tests/distributed/test_agreement.py: arguments that differ between the processes of a group.

Each case has a process group of its own with a short timeout, so a hang becomes an error after seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysupcon
from helpers.distributed_worker import WIDTH
from pysupcon import functional
from pysupcon.distributed import AllGather, Ring
from pysupcon.gradcache import GradCache

TIMEOUT = timedelta(seconds=20)  # only reached by a hang
MODES = {"all": AllGather, "ring": Ring}
SAMPLES = 4
Criterion = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[Any], Criterion]
"""gather -> criterion"""


def _module(kind: type[nn.Module] = pysupcon.SupConLoss, **own: Any) -> Build:
    return lambda gather: kind(gather=gather, **own)


def _function(function: Callable[..., Tensor], **own: Any) -> Build:
    return lambda gather: lambda features, labels: function(features, labels, gather=gather, **own)


def _call(**changed: Any) -> Build:
    """SupConLoss, called with other arguments."""
    return lambda gather: (
        lambda features, labels: pysupcon.SupConLoss(gather=gather)(
            **{"features": features, "labels": labels, **changed}
        )
    )


def _statistics(gather: Any) -> Criterion:
    return lambda features, labels: functional.pair_statistics(features, labels, gather=gather)[0].sum()


def _cached(temperature: float) -> Build:
    """SupConLoss in a step of GradCache."""

    def build(gather: Any) -> Criterion:
        loss = pysupcon.SupConLoss(temperature, gather=gather)
        cache = GradCache(nn.Linear(WIDTH, WIDTH), 3)
        return lambda views, labels: cache(views.detach(), lambda z: loss(z, labels)).requires_grad_()

    return build


def _clip(**own: Any) -> Build:
    """InfoNCE of views against candidates."""
    return lambda gather: (
        lambda views, labels: pysupcon.InfoNCELoss(gather=gather, **own)(views, candidates=views.detach())
    )


_SINCERE, _SPREAD, _CNCE = pysupcon.SINCERELoss, pysupcon.SpreadLoss, pysupcon.ClassConditionalInfoNCELoss
_LABELS, _ROWS = torch.arange(SAMPLES) % 2, torch.ones(SAMPLES, WIDTH)
_BANK = {"memory": _ROWS, "memory_labels": _LABELS, "instances": _LABELS, "memory_instances": _LABELS}
DIFFERENCES: dict[str, tuple[str, tuple[Build, str], tuple[Build, str]]] = {
    "temperature": (
        "temperature", (_module(temperature=0.07), "0.07"), (_module(temperature=0.1), "0.1"),
    ),
    "temperature of a function": (
        "temperature",
        (_function(functional.dcl, temperature=torch.tensor(0.25)), "0.25"),
        (_function(functional.dcl, temperature=1), "1"),
    ),
    "temperature in GradCache": ("temperature", (_cached(0.07), "0.07"), (_cached(0.1), "0.1")),
    "learnable": (
        "whether temperature is learnable",
        (_module(learnable_temperature=True), "True"),
        (_module(), "False"),
    ),
    "base_temperature": (
        "base_temperature", (_module(), "None"), (_module(base_temperature=0.1), "0.1"),
    ),
    "epsilon": ("epsilon", (_module(_SINCERE), "0"), (_module(_SINCERE, epsilon=0.25), "0.25")),
    "alpha": ("alpha", (_module(_SPREAD), "0.5"), (_module(_SPREAD, alpha=0.25), "0.25")),
    "base": ("base", (_module(_SPREAD), "supcon"), (_module(_SPREAD, base="sincere"), "sincere")),
    "loss": ("loss", (_module(), "supcon"), (_module(_SINCERE), "sincere")),
    "loss with other statistics": ("loss", (_module(_CNCE), "cnce"), (_module(_SPREAD), "spread")),
    "loss and pair_statistics": ("loss", (_module(), "supcon"), (_statistics, "pair...")),
    "symmetric": ("symmetric", (_clip(symmetric=True), "True"), (_clip(), "False")),
    "reduction": ("reduction", (_module(reduction="sum"), "sum"), (_module(), "mean")),
    "reduction none": ("reduction", (_module(reduction="none"), "none"), (_module(), "mean")),
    "normalize": ("normalize", (_module(normalize=True), "True"), (_module(), "False")),
    "contrast_mode": ("contrast_mode", (_module(contrast_mode="one"), "one"), (_module(), "all")),
    "candidates": (
        "whether candidates are given",
        (_call(candidates=torch.ones(SAMPLES, WIDTH), candidate_labels=_LABELS), "True"),
        (_module(), "False"),
    ),
    "views of candidates": (
        "number of views of candidates",
        (_call(candidates=torch.ones(SAMPLES, 2, WIDTH), candidate_labels=_LABELS), "2"),
        (_call(candidates=torch.ones(SAMPLES, WIDTH), candidate_labels=_LABELS), "1"),
    ),
    "gradient of candidates": (
        "whether a gradient of candidates is wanted",
        (_call(candidates=torch.ones(3, WIDTH, requires_grad=True), candidate_labels=_LABELS[:3]), "True"),
        (_call(candidates=torch.ones(2, WIDTH), candidate_labels=_LABELS[:2]), "False"),
    ),
    "mask": (
        "whether a mask is given",
        (_call(labels=None, mask=torch.eye(SAMPLES, dtype=torch.bool)), "True"),
        (_module(), "False"),
    ),
    "labels": ("whether labels are given", (_call(labels=None), "False"), (_module(), "True")),
    "instances": ("whether instances are given", (_call(instances=_LABELS), "True"), (_module(), "False")),
    "memory": (
        "whether memory is given", (_call(memory=_ROWS, memory_labels=_LABELS), "True"), (_module(), "False"),
    ),
    "hard_negatives": (
        "whether hard_negatives are given",
        (_call(hard_negatives=torch.ones(SAMPLES, 1, WIDTH)), "True"),
        (_module(), "False"),
    ),
    "candidate_weights": (
        "whether candidate_weights are given",
        (_call(candidate_weights=torch.ones(SAMPLES)), "True"),
        (_module(), "False"),
    ),
    "anchor_weights": (
        "whether anchor_weights are given",
        (_call(anchor_weights=torch.ones(SAMPLES)), "True"),
        (_module(), "False"),
    ),
    "exclude_batch_from_memory": (
        "exclude_batch_from_memory",
        (_call(**_BANK, exclude_batch_from_memory=True), "True"),
        (_call(**_BANK), "False"),
    ),
    "batch_negatives": (
        "batch_negatives",
        (_function(functional.dcl, memory=_ROWS, memory_labels=_LABELS, batch_negatives=False), "False"),
        (_function(functional.dcl, memory=_ROWS, memory_labels=_LABELS), "True"),
    ),
    "class_balance": ("class_balance", (_module(class_balance=True), "True"), (_module(), "False")),
    "ignore_index": (
        "ignore_index", (_module(ignore_index=-1), "-1"), (_module(), "None"),
    ),
    "a large ignore_index": (
        "ignore_index",
        (_module(ignore_index=10**7), "10000000"),
        (_module(ignore_index=10**7 + 1), "10000001"),
    ),
    "unlabeled": (
        "unlabeled",
        (_module(ignore_index=-1, unlabeled="instance"), "instance"),
        (_module(ignore_index=-1), "ignore"),
    ),
    "gradient": (
        "whether a gradient is wanted", (_call(features=torch.ones(SAMPLES, 2, WIDTH)), "False"),
        (_module(), "True"),
    ),
    "dimensions": (
        "number of dimensions of features",
        (_call(features=torch.ones(SAMPLES, WIDTH, requires_grad=True)), "2"),
        (_module(), "3"),
    ),
    "views": (
        "number of views of features",
        (_call(features=torch.ones(SAMPLES, 3, WIDTH, requires_grad=True)), "3"),
        (_module(), "2"),
    ),
    "width": (
        "width D of features",
        (_call(features=torch.ones(SAMPLES, 2, WIDTH + 1, requires_grad=True)), str(WIDTH + 1)),
        (_module(), str(WIDTH)),
    ),
    "dtype": (
        "dtype of features",
        (_call(features=torch.ones(SAMPLES, 2, WIDTH).double().requires_grad_()), "torch.float64"),
        (_module(), "torch.float32"),
    ),
}  # fmt: skip
"""Name in the message; criterion and value of process 0; criterion and value of the other processes"""
INVALID: dict[str, tuple[Build, str]] = {
    "labels": (_call(labels=torch.rand(SAMPLES)), "ValueError: labels must be integers"),
    "features": (_call(features=[1.0]), "TypeError: features must be a float tensor"),
    "normalize": (
        _function(functional.supcon, normalize=torch.ones(2)), "RuntimeError: Boolean value of Tensor",
    ),
    "backend": (_module(backend="reference"), "ValueError: gather needs a streaming backend"),
    "temperature": (
        _function(functional.supcon, temperature=10**400), "ValueError: temperature must be from 1e-12",
    ),
}  # fmt: skip
"""Criterion whose arguments process 0 refuses before it sends anything; its error"""


class _Unchecked(AllGather):
    """Sends no message, because all processes have as many samples."""

    def begin(self, features: Tensor, must_match: dict[str, int]) -> Any:
        return self._communicator((SAMPLES,) * dist.get_world_size(), features.shape[1])


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(SAMPLES, 2, WIDTH, generator=generator, requires_grad=True), _LABELS


def _step(criterion: Criterion) -> str:
    """Runs forward and backward; returns the error."""
    try:
        criterion(*_batch()).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _refusal(mode: str, first: Build, others: Build) -> list[str]:
    """The error of this process, and that of a step afterwards in which the processes agree."""
    gather = MODES[mode](dist.new_group(timeout=TIMEOUT))
    own = first if dist.get_rank() == 0 else others
    return [_step(own(gather)), _step(others(gather))]


def differing(what: str, mode: str) -> list[str]:
    """Process 0 has another argument than the other processes."""
    _, (first, _), (others, _) = DIFFERENCES[what]
    return _refusal(mode, first, others)


def invalid(what: str, mode: str) -> list[str]:
    """Process 0 refuses its arguments."""
    return _refusal(mode, INVALID[what][0], _module())


def unsupported(what: str) -> list[str]:
    """All processes give arguments that gather does not support."""
    first = DIFFERENCES[what][1][0]
    return _refusal("all", first, first)


def unmatched(mode: str) -> list[str]:
    """Without labels, process 0 has one candidate more than samples."""

    def build(count: int) -> Build:
        return _call(labels=None, candidates=torch.ones(count, WIDTH))

    return _refusal(mode, build(SAMPLES + 1), build(SAMPLES))


def gather_mode() -> list[str]:
    """Process 0 all-gathers, the others form a ring."""
    group = dist.new_group(timeout=TIMEOUT)
    gather = (AllGather if dist.get_rank() == 0 else Ring)(group)
    return [_step(_module()(gather)), _step(_module()(Ring(group)))]


def last_bits() -> str:
    """The temperatures of a schedule differ in their last bit."""
    temperature = 0.1 if dist.get_rank() == 0 else math.nextafter(0.1, 1)
    return _step(pysupcon.SupConLoss(temperature, gather=AllGather(dist.new_group(timeout=TIMEOUT))))


def bad_rows(what: str, mode: str) -> list[str]:
    """The last process has a row that no loss accepts, and process 0 has no rows or only small ones."""
    features, _ = _batch()
    last = dist.get_rank() == dist.get_world_size() - 1
    changed: dict[str, Any] = {"features": features.detach().clone().requires_grad_()}
    if what.startswith("candidates"):
        candidates = torch.ones(SAMPLES + dist.get_rank(), WIDTH)
        changed |= {"candidates": candidates, "candidate_labels": torch.arange(len(candidates)) % 2}
        if dist.get_rank() == 0:
            changed["features"].data[1, 1] = 1e4
        if last:
            candidates[1] = math.nan if what.endswith("not finite") else 1e16
    elif last:
        changed["features"].data[1, 1] = math.nan if what == "not finite" else 1e8
    elif what == "not finite" and dist.get_rank() == 0:
        changed = {"features": features[:0].detach().requires_grad_(), "labels": _LABELS[:0]}
    gather = MODES[mode](dist.new_group(timeout=TIMEOUT))
    return [_step(_call(**changed)(gather)), _step(_module()(gather))]


def unchecked(name: str) -> list[list[Tensor]]:
    """Loss and gradient with the message that compares the arguments, and without it."""
    results = []
    for kind in (AllGather, _Unchecked):
        features, labels = _batch()
        loss = DIFFERENCES[name][1][0](kind(dist.new_group(timeout=TIMEOUT)))(features, labels)
        loss.sum().backward()
        results.append([loss.detach(), features.grad])
    return results


def learnable(how: str) -> dict[str, Any]:
    """Trains a temperature, whose gradient is averaged over the processes ("ddp") or not ("alone"), and
    evaluates the loss without gradients."""
    gather = AllGather(dist.new_group(timeout=TIMEOUT))
    loss = pysupcon.SupConLoss(0.5, normalize=True, gather=gather, learnable_temperature=True)
    criterion = DistributedDataParallel(loss) if how == "ddp" else loss
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    features, labels = _batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="the rows of features have a mean norm")
        for _ in range(5):
            optimizer.zero_grad()
            criterion(features, labels).backward()
            optimizer.step()
        with torch.no_grad():
            loss(features, labels)
    return {
        "temperature": loss.temperature.item(),
        "warnings": [(str(entry.message), entry.filename) for entry in caught],
    }


CASES = {
    function.__name__: function
    for function in (
        differing,
        invalid,
        unmatched,
        unsupported,
        gather_mode,
        last_bits,
        bad_rows,
        unchecked,
        learnable,
    )
}
