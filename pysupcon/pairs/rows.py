"""Per anchor: from statistics to the loss, and from losses to one number. O(N), ordinary autograd.

An anchor that has no loss gives 0, and its row is kept away from infinities in the forward, so that no NaN is
born in the backward. ``count`` is |P_i| (of the instance: |A_i|), int64 [M]; statistics as in
:class:`pysupcon.pairs.autograd.RowStatistics`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.pairs.autograd import RowStatistics
from pysupcon.pairs.modes import is_eager

__all__ = ["cnce_rows", "reduce_rows", "sincere_rows", "supcon_reduced", "supcon_rows"]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=1)


class _SupConRows(torch.autograd.Function):
    """log1p(e^(n - p)) + (p - mean) of every anchor that has a positive, or, with a ``divisor``, their sum
    divided by it. Nothing large cancels: p and the mean have the rounding of s in common. A single positive
    is both, and the mean gets p's gradient, too. By hand what autograd would do with a dozen nodes: small
    batches are all overhead."""

    @staticmethod
    def forward(
        ctx: Any, n: Tensor, p: Tensor, positive_sum: Tensor, count: Tensor, valid: Tensor, divisor: Any
    ) -> Tensor:
        gap = (positive_sum / count).neg_().add_(p).clamp_(min=0.0)
        loss = gap.add_(_softplus(n - p)).masked_fill_(valid.logical_not(), 0.0)
        ctx.save_for_backward(n, p, count)  # which are kept anyway
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
        return grad_n, grad_p, grad_sum, None, None, None


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); above 40 it is x to the last digit of a float64."""
    return F.softplus(x, threshold=40.0)


def supcon_rows(statistics: RowStatistics, count: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_{P_i, N_i} e^s - mean_{P_i} s, and which anchors have a positive."""
    return _supcon(statistics, count, count > 0, None), count > 0


def supcon_reduced(statistics: RowStatistics, count: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What :func:`reduce_rows` makes of :func:`supcon_rows`, in one step."""
    valid = count > 0
    return _supcon(statistics, count, valid, _divisor(valid.sum(), reduction)).to(dtype)


def _supcon(s: RowStatistics, count: Tensor, valid: Tensor, divisor: Tensor | int | None) -> Tensor:
    """:class:`_SupConRows`, or in a graph and under transforms the nodes for which it stands."""
    if is_eager(s.n):
        loss: Tensor = _SupConRows.apply(s.n, s.p, s.positive_sum, count, valid, divisor)
        return loss
    above = torch.where(valid, s.n, 0.0) - torch.where(valid, s.p, 0.0)
    gap = _gap(s, s.positive_sum, count, count, valid)
    loss = torch.where(valid, _softplus(above) + gap, 0.0)
    return loss if divisor is None else loss.sum() / divisor


def _gap(s: RowStatistics, total: Tensor, among: Tensor, count: Tensor, valid: Tensor) -> Tensor:
    """p - mean, the mean over ``among`` of the ``count`` terms of p; 0 where not valid. It is not negative
    (Jensen): what is below 0 is rounding, and has the gradient that it would have above."""
    p = torch.where(count == 1, s.positive_sum, s.p)  # the same, without an exponential and its logarithm
    gap = torch.where(valid, p - _mean(total, among), 0.0)
    return gap + (gap.detach().clamp(min=0.0) - gap.detach())


def sincere_rows(softplus: Tensor, count: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """mean_{P_i} softplus(n_i - s_ip + epsilon) - epsilon, and which anchors have a positive."""
    valid = count > 0
    loss = _mean(softplus, count)
    if torch.compiler.is_compiling() or epsilon:  # a graph does not ask: it would be one for this number
        loss = torch.where(valid, loss - epsilon, 0.0)
    return loss, valid


def cnce_rows(
    s: RowStatistics, instance_count: Tensor, count: Tensor, among_positives: bool
) -> tuple[Tensor, Tensor]:
    """p_i - mean_{A_i} s, and which anchors have another row of their instance. ``among_positives``: A_i is a
    part of P_i; a caller's mask may have it otherwise."""
    valid = (instance_count > 0) & (count > 0)
    if among_positives:
        gap = _gap(s, s.instance_sum, instance_count, count, valid)
    else:
        gap = torch.where(valid, s.p - _mean(s.instance_sum, instance_count), 0.0)
    return torch.where(valid, gap, 0.0), valid


def _divisor(anchors: Tensor, reduction: str) -> Tensor | int | None:
    """Of the sum over the anchors that have a loss; None: they stay apart. Warns where there is no anchor, if
    that can be known without waiting for a device."""
    divisor: Tensor | int
    if anchors.device.type == "cpu" and is_eager(anchors):
        divisor = int(anchors)
        if not divisor:
            words = "no anchor of this batch has a positive: the loss is 0 and teaches nothing"
            warnings.warn(words, stacklevel=6)  # the caller of the loss
            divisor = 1
    else:
        divisor = anchors.clamp(min=1)
    return {"mean": divisor, "sum": 1, "none": None}[reduction]


def reduce_rows(
    loss: Tensor,
    valid: Tensor,
    reduction: str,
    dtype: torch.dtype,
    count: Tensor | None = None,
    processes: int = 1,
) -> Tensor:
    """``"mean"`` over the anchors that have a loss, ``"sum"``, or ``"none"`` [M]; in ``dtype``.

    ``count``: number of anchors of all ``processes`` that have a loss; ``"mean"`` is then such that its mean
    over the processes is the mean over all their anchors.
    """
    divisor = _divisor(valid.sum() if count is None else count, reduction)
    if divisor is None:
        return loss.to(dtype)
    total = loss.sum() / divisor
    if reduction == "mean" and processes > 1:
        total = total * processes
    return total.to(dtype)
