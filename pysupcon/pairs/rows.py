"""What several losses compute per anchor from the statistics. O(N), ordinary autograd.

An anchor without a loss gives 0. Its infinities are replaced in the forward, so that the backward makes no
NaN. ``count`` is |P_i| (for an instance |A_i|), int64 [M]; statistics as in
:class:`pysupcon.pairs.autograd.RowStatistics`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.caller import warn_caller
from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.modes import is_eager

__all__ = ["get_divisor", "mean", "positive_gap", "supcon_rows", "weighted_divisor"]


def get_positive_shift(count: Tensor, dtype: torch.dtype) -> Tensor:
    """What class_balance adds to the log weights of the ``count`` positives of an anchor: their number is
    counted with the anchor itself, which is not its own candidate."""
    return (1 / count.clamp(min=1).to(dtype)).log1p()


def mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=1)


class _SupConRows(torch.autograd.Function):
    """log1p(e^(n - p)) + (p - mean) of every anchor that has a positive; with a ``divisor`` their sum divided
    by it. Nothing large cancels: p and the mean share the rounding of s. A single positive is both p and the
    mean, so the mean gets p's gradient, too. One node in place of a dozen of autograd's, which dominate the
    time of a small batch."""

    @staticmethod
    def forward(
        ctx: Any, n: Tensor, p: Tensor, positive_sum: Tensor, count: Tensor, valid: Tensor, weighted: bool,
        divisor: Any,
    ) -> Tensor:  # fmt: skip
        gap = (positive_sum / count).neg_().add_(p)
        if not weighted:
            gap.clamp_(min=0.0)
        loss = gap.add_(_softplus(n - p)).masked_fill_(valid.logical_not(), 0.0)
        ctx.save_for_backward(n, p, count)  # kept anyway
        ctx.divisor = divisor
        return loss if divisor is None else loss.sum() / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        n, p, count = ctx.saved_tensors
        grad = grad if ctx.divisor is None else grad / ctx.divisor
        grad_n = torch.where(count > 0, (n - p).sigmoid_() * grad, 0.0)
        several = count > 1
        grad_p = torch.where(several, grad - grad_n, 0.0)
        grad_sum = torch.where(several, -grad / count, -grad_n)
        return grad_n, grad_p, grad_sum, *(None,) * 4


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); above 40 it is x to the last digit of a float64."""
    return F.softplus(x, threshold=40.0)


def supcon_rows(s: RowStatistics, counts: Any, valid: Tensor, divisor: Tensor | int | None = None) -> Tensor:
    """log sum_{P_i, N_i} e^s - mean_{P_i} s; with a ``divisor`` their sum divided by it.

    Computed by :class:`_SupConRows`; when traced or transformed, by the equivalent torch operations.
    """
    count = counts.positives
    loss: Tensor
    if counts.mean_given:
        loss = torch.where(valid, s.n - s.positive_sum, 0.0)
        return loss if divisor is None else loss.sum() / divisor
    if is_eager(s.n):
        loss = _SupConRows.apply(s.n, s.p, s.positive_sum, count, valid, counts.weighted, divisor)
        return loss
    above = torch.where(valid, s.n, 0.0) - torch.where(valid, s.p, 0.0)
    gap = positive_gap(s, s.positive_sum, count, counts, valid)
    loss = torch.where(valid, _softplus(above) + gap, 0.0)
    return loss if divisor is None else loss.sum() / divisor


def positive_gap(s: RowStatistics, total: Tensor, among: Tensor, counts: Any, valid: Tensor) -> Tensor:
    """p - mean, the mean over ``among`` of the terms of p; 0 where not valid.

    Without weights it is not negative (Jensen): negative values are rounding errors; they become 0 and keep
    their gradient.
    """
    if counts.weighted:
        return torch.where(valid, s.p, 0.0) - torch.where(valid, mean(total, among), 0.0)
    p = torch.where(counts.positives == 1, s.positive_sum, s.p)  # equal, without exp and log
    gap = torch.where(valid, p - mean(total, among), 0.0)
    return gap + (gap.detach().clamp(min=0.0) - gap.detach())


def get_divisor(anchors: Tensor, reduction: str, requirement: str) -> Tensor | int | None:
    """The divisor of the sum of the losses of ``anchors`` anchors; None: no sum is taken.

    Warns where there is no anchor, if that is known without waiting for a device. ``requirement``: what an
    anchor needs to have a loss.
    """
    divisor: Tensor | int
    if anchors.device.type == "cpu" and is_eager(anchors):
        divisor = int(anchors)
        if not divisor:
            warn_caller(f"no anchor of this batch has {requirement}: the loss and its gradient are 0")
            divisor = 1
    else:
        divisor = anchors.clamp(min=1)
    return {"mean": divisor, "sum": 1, "none": None}[reduction]


def weighted_divisor(total: Tensor, reduction: str) -> Tensor | int | None:
    """The divisor of the sum of weighted losses; None: no sum is taken. ``total``: weight of all anchors that
    have a loss."""
    if reduction == "mean":
        return torch.where(total > 0, total, 1.0)
    return 1 if reduction == "sum" else None
