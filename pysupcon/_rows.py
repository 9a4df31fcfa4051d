"""Per anchor: from statistics to the loss, and from losses to one number. O(N), ordinary autograd.

An anchor that has no loss gives 0, and its row is kept away from infinities in the forward, so that no NaN is
born in the backward. ``count`` is |P_i| (of the instance: |A_i|), int64 [M]; statistics as in
:class:`pysupcon._autograd.RowStatistics`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._autograd import RowStatistics

__all__ = ["cnce_rows", "reduce_rows", "sincere_rows", "supcon_reduced", "supcon_rows"]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=1)


class _SupConRows(torch.autograd.Function):
    """log sum - mean of every anchor that has a positive, or, with a ``divisor``, their sum divided by it. By
    hand what autograd would do with eight nodes: small batches are all overhead."""

    @staticmethod
    def forward(
        ctx: Any, denominator: Tensor, positive_sum: Tensor, count: Tensor, valid: Tensor, divisor: Any
    ) -> Tensor:
        ctx.save_for_backward(count, valid)
        ctx.divisor = divisor
        loss = torch.where(valid, denominator - positive_sum / count, 0.0)
        return loss if divisor is None else loss.sum().div_(divisor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        count, valid = ctx.saved_tensors
        grad = torch.where(valid, grad if ctx.divisor is None else grad / ctx.divisor, 0.0)
        return grad, grad / -count.clamp(min=1), None, None, None


def supcon_rows(statistics: RowStatistics, count: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_{P_i, N_i} e^s - mean_{P_i} s, and which anchors have a positive."""
    valid = count > 0
    denominator = torch.logaddexp(statistics.n, torch.where(valid, statistics.p, 0.0))
    return _SupConRows.apply(denominator, statistics.positive_sum, count, valid, None), valid


def supcon_reduced(statistics: RowStatistics, count: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What :func:`reduce_rows` makes of :func:`supcon_rows`, in one step; from the one sum of a row."""
    valid = count > 0
    assert statistics.denominator is not None
    divisor = _divisor(valid.sum(), reduction)
    loss = _SupConRows.apply(statistics.denominator, statistics.positive_sum, count, valid, divisor)
    return loss.to(dtype)


def sincere_rows(softplus: Tensor, count: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """mean_{P_i} softplus(n_i - s_ip + epsilon) - epsilon, and which anchors have a positive."""
    valid = count > 0
    loss = _mean(softplus, count)
    return (torch.where(valid, loss - epsilon, 0.0) if epsilon else loss), valid


def cnce_rows(
    p: Tensor, instance_sum: Tensor, instance_count: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """p_i - mean_{A_i} s, and which anchors have another row of their instance."""
    valid = (instance_count > 0) & (count > 0)
    return torch.where(valid, p - _mean(instance_sum, instance_count), 0.0), valid


def _divisor(anchors: Tensor, reduction: str) -> Tensor | int | None:
    """Of the sum over the anchors that have a loss; None: they stay apart. Warns where there is no anchor, if
    that can be known without waiting for a device."""
    divisor: Tensor | int
    if anchors.device.type == "cpu" and not torch.compiler.is_compiling():
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
