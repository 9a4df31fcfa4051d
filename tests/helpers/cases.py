"""The losses under test, and an independent reference: sets by their definition, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

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


def _anchor_loss(
    name: str, positives: list[Tensor], negatives: list[Tensor], own: list[Tensor]
) -> Tensor | None:
    """The loss of one anchor from its similarities to P, N and A, by the formulas of the papers; None: it has
    none."""
    if name in ("supcon", "sincere", "eps_supinfonce"):
        if not positives:
            return None
        if name == "supcon":
            return -torch.stack([s - _log_sum(positives + negatives) for s in positives]).mean()
        epsilon = 0.25 if name == "eps_supinfonce" else 0.0
        return -torch.stack([s - _log_sum([s - epsilon, *negatives]) for s in positives]).mean()
    if name == "dcl":
        return _log_sum(negatives) - torch.stack(positives).mean() if positives and negatives else None
    if name == "cnce":
        return -torch.stack([s - _log_sum(positives) for s in own]).mean() if own and positives else None
    if name not in ("spread", "spread_sincere"):
        raise KeyError(f"cases.py has no formula for {name}")
    if not positives:
        return None
    base = _anchor_loss("sincere" if name == "spread_sincere" else "supcon", positives, negatives, own)
    second = _anchor_loss("cnce", positives, negatives, own)
    assert base is not None
    return 0.7 * base + (0.3 * second if second is not None else 0.0)


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
) -> Tensor:
    """The loss in float64, one anchor and one pair at a time."""

    def rows(tensor: Tensor) -> list[tuple[int, int]]:
        return [(b, v) for b in range(tensor.shape[0]) for v in range(tensor.shape[1])]

    def views(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)

    shape = list(features.shape[:-1])
    x = views(features).double()
    c = x if candidates is None else views(candidates).double()
    side: Any = instances if instances is not None else torch.arange(x.shape[0])
    if candidates is None:
        other_side, other_labels = side, labels
    else:
        other_side = candidate_instances if candidate_instances is not None else torch.arange(c.shape[0])
        other_labels = candidate_labels
    losses: list[Tensor | None] = []
    for b, v in rows(x):
        if contrast_mode == "one" and v > 0:
            continue
        positives, negatives, own = [], [], []
        for b2, v2 in rows(c):
            if candidates is None and (b, v) == (b2, v2):
                continue
            s = (x[b, v] * c[b2, v2]).sum() / temperature
            same_instance = bool(side[b] == other_side[b2])
            if mask is not None:
                positive = bool(mask[b, b2])
            elif labels is not None:
                assert other_labels is not None
                positive = bool(labels[b] == other_labels[b2])
            else:
                positive = same_instance
            (positives if positive else negatives).append(s)
            if same_instance:
                own.append(s)
        losses.append(_anchor_loss(name, positives, negatives, own))
    valid = [loss for loss in losses if loss is not None]
    zero = x.sum() * 0
    if reduction == "none":
        filled = (
            torch.stack([zero if loss is None else loss for loss in losses]) if losses else x.sum((1, 2)) * 0
        )
        return filled.view(shape[:1] if contrast_mode == "one" else shape)
    total = torch.stack(valid).sum() if valid else zero
    return total / max(len(valid), 1) if reduction == "mean" else total
