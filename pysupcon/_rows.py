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

__all__ = ["cnce_rows", "reduce_rows", "sincere_rows", "supcon_rows"]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp(min=1)


class _SupConRows(torch.autograd.Function):
    """By hand what autograd would do with five nodes and as many vectors: small batches are all overhead, and
    large ones keep two vectors."""

    @staticmethod
    def forward(ctx: Any, denominator: Tensor, positive_sum: Tensor, count: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(count, valid)
        loss = torch.addcdiv(denominator, positive_sum, count.to(denominator.dtype), value=-1)
        return loss.masked_fill_(~valid, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        count, valid = ctx.saved_tensors
        grad = grad.masked_fill(~valid, 0.0)
        return grad, grad.neg().div_(count.clamp(min=1)), None, None


def supcon_rows(statistics: RowStatistics, count: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_{P_i, N_i} e^s - mean_{P_i} s, and which anchors have a positive."""
    valid = count > 0
    denominator = statistics.denominator
    if denominator is None:
        denominator = torch.logaddexp(statistics.n, torch.where(valid, statistics.p, 0.0))
    return _SupConRows.apply(denominator, statistics.positive_sum, count, valid), valid


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
    count = valid.sum() if count is None else count
    divisor: Tensor | int = count.clamp(min=1)
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        divisor = int(divisor)
        if not count:
            warnings.warn(
                "no anchor of this batch has a positive: the loss is 0 and teaches nothing", stacklevel=4
            )
    if reduction == "none":
        return loss.to(dtype)
    total = loss.sum()
    if reduction == "mean":
        total = total / divisor
        total = total * processes if processes > 1 else total
    return total.to(dtype)
