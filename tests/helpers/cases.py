"""The losses under test, and an independent reference: sets by their definition, pair by pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pysupcon
from pysupcon.contrastive import ContrastiveLoss

CASES: dict[str, tuple[type[ContrastiveLoss], dict[str, Any]]] = {
    "supcon": (pysupcon.SupConLoss, {}),
    "sincere": (pysupcon.SINCERELoss, {}),
    "eps_supinfonce": (pysupcon.SINCERELoss, {"epsilon": 0.25}),
    "cnce": (pysupcon.ClassConditionalInfoNCELoss, {}),
    "spread": (pysupcon.SpreadLoss, {"alpha": 0.3}),
    "spread_sincere": (pysupcon.SpreadLoss, {"alpha": 0.3, "base": "sincere"}),
    "dcl": (pysupcon.DCLLoss, {}),
}
"""Every loss that takes labels: its module, and its own parameters"""
LOSSES: dict[str, Callable[..., Tensor]] = {
    name: partial(loss.function, **own) for name, (loss, own) in CASES.items()
}
NEEDS_INSTANCES = {name for name, (loss, _) in CASES.items() if loss.needs_instances}
NEGATIVE = {"eps_supinfonce", "dcl"}
"""Losses that may be below 0"""


def _log_sum(values: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(values), 0) if values else torch.tensor(-math.inf, dtype=torch.float64)


class _Pair(NamedTuple):
    """An anchor and a candidate."""

    s: Tensor
    """similarity"""
    t: Tensor
    """similarity + log weight of the candidate, in sums of exponentials"""


def _anchor_loss(
    name: str, positives: list[_Pair], negatives: list[_Pair], own: list[_Pair]
) -> Tensor | None:
    """The loss of one anchor from its pairs with P, N and A, by the formulas of the papers; None: it has
    none."""

    def log_sum(pairs: list[_Pair]) -> Tensor:
        return _log_sum([pair.t for pair in pairs])

    if name in ("supcon", "sincere", "eps_supinfonce"):
        if not positives:
            return None
        if name == "supcon":
            return -torch.stack([pair.s - log_sum(positives + negatives) for pair in positives]).mean()
        epsilon = 0.25 if name == "eps_supinfonce" else 0.0
        others = [pair.t for pair in negatives]
        return -torch.stack([pair.s - _log_sum([pair.t - epsilon, *others]) for pair in positives]).mean()
    if name == "dcl":
        if not positives or not negatives:
            return None
        return log_sum(negatives) - torch.stack([pair.s for pair in positives]).mean()
    if name == "cnce":
        if not own or not positives:
            return None
        return -torch.stack([pair.s - log_sum(positives) for pair in own]).mean()
    if name not in ("spread", "spread_sincere"):
        raise KeyError(f"cases.py has no formula for {name}")
    if not positives:
        return None
    base = _anchor_loss("sincere" if name == "spread_sincere" else "supcon", positives, negatives, own)
    second = _anchor_loss("cnce", positives, negatives, own)
    assert base is not None
    return 0.7 * base + (0.3 * second if second is not None else 0.0)


class _Candidate(NamedTuple):
    """A row that anchors are contrasted with."""

    row: Tensor
    sample: int
    view: int
    label: Any
    instance: Any
    weight: float
    of_batch: bool


def naive(
    name: str,
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    reduction: str = "mean",
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    memory_instances: Tensor | None = None,
    memory_weights: Tensor | None = None,
    exclude_batch_from_memory: bool = False,
    hard_negatives: Tensor | None = None,
    candidate_weights: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    batch_negatives: bool = True,
    class_balance: bool = False,
    ignore_index: int | None = None,
    unlabeled: str = "ignore",
) -> Tensor:
    """The loss in float64, one anchor and one pair at a time."""

    def rows(tensor: Tensor) -> list[tuple[int, int]]:
        return [(b, v) for b in range(tensor.shape[0]) for v in range(tensor.shape[1])]

    def views(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)

    def at(values: Tensor | None, b: int, v: int) -> float:
        return 1.0 if values is None else float(values[b, v] if values.dim() == 2 else values[b])

    def class_of(label: Any, instance: Any) -> Any:
        """What positives have in common."""
        if labels is None:
            return "instance", instance
        unknown = ignore_index is not None and label == ignore_index
        return ("unlabelled", instance) if unknown and unlabeled == "instance" else ("label", label)

    shape = list(features.shape[:-1])
    x = views(features).double()
    c = x if candidates is None else views(candidates).double()
    side: Any = (instances if instances is not None else torch.arange(x.shape[0])).tolist()
    own_labels = [None] * x.shape[0] if labels is None else labels.tolist()
    if candidates is None:
        other_side, other_labels = side, own_labels
    else:
        given = candidate_instances if candidate_instances is not None else torch.arange(c.shape[0])
        other_side = given.tolist()
        other_labels = [None] * c.shape[0] if candidate_labels is None else candidate_labels.tolist()
    listed = [
        _Candidate(c[b, v], b, v, other_labels[b], other_side[b], at(candidate_weights, b, v), True)
        for b, v in rows(c)
    ]
    for k in range(0 if memory is None else memory.shape[0]):
        assert memory is not None
        instance = ("memory", k) if memory_instances is None else int(memory_instances[k])
        if exclude_batch_from_memory and instance in side:
            continue
        label = ("memory", k) if memory_labels is None else int(memory_labels[k])
        weight = 1.0 if memory_weights is None else float(memory_weights[k])
        if weight > 0:
            listed.append(_Candidate(memory[k].double(), k, 0, label, instance, weight, False))
    if ignore_index is not None and unlabeled == "ignore":
        listed = [candidate for candidate in listed if candidate.label != ignore_index]
    losses: list[Tensor | None] = []
    weights = []
    for b, v in rows(x):
        if contrast_mode == "one" and v > 0:
            continue
        weights.append(at(anchor_weights, b, v))
        positives, negatives, own = [], [], []
        others = [
            candidate
            for candidate in listed
            if candidates is not None
            or not candidate.of_batch
            or (b, v) != (candidate.sample, candidate.view)
        ]
        sizes = Counter(class_of(candidate.label, candidate.instance) for candidate in others)
        for candidate in others:
            weight = candidate.weight
            if class_balance:
                weight /= sizes[class_of(candidate.label, candidate.instance)]
            s = (x[b, v] * candidate.row).sum() / temperature
            same_instance = side[b] == candidate.instance
            if mask is not None:
                positive = bool(mask[b, candidate.sample])
            else:
                positive = class_of(own_labels[b], side[b]) == class_of(candidate.label, candidate.instance)
            pair = _Pair(s, s + math.log(weight))
            if positive:
                positives.append(pair)
            elif batch_negatives or not candidate.of_batch:
                negatives.append(pair)
            if same_instance and (positive or mask is not None):
                own.append(pair)
        for k in range(0 if hard_negatives is None else hard_negatives.shape[1]):
            assert hard_negatives is not None
            s = (x[b, v] * hard_negatives[b, k].double()).sum() / temperature
            negatives.append(_Pair(s, s))
        ignored = ignore_index is not None and unlabeled == "ignore" and own_labels[b] == ignore_index
        losses.append(None if ignored else _anchor_loss(name, positives, negatives, own))
    zero = x.sum() * 0
    if reduction == "none":
        filled = [zero if loss is None else loss * w for loss, w in zip(losses, weights, strict=True)]
        stacked = torch.stack(filled) if losses else x.sum((1, 2)) * 0
        return stacked.view(shape[:1] if contrast_mode == "one" else shape)
    valid = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss is not None]
    total = torch.stack([loss * w for loss, w in valid]).sum() if valid else zero
    return total / (sum(w for _, w in valid) or 1) if reduction == "mean" else total
