"""The differentiable step of every loss: from rows to statistics per anchor.

:func:`row_statistics` computes per-anchor statistics with the operators of a backend; its backward recomputes
the pairs. All later steps of a loss are O(N) and ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs import custom_op
from pysupcon.pairs.modes import NO_FORWARD_MODE, ONCE_ONLY, is_batched, is_eager
from pysupcon.pairs.statistics import Plan, RowStatistics, compute, gradients

__all__ = ["RefuseSecond", "RowStatistics", "row_statistics"]


class RefuseSecond(torch.autograd.Function):
    """The identity on gradients; a second differentiation raises an error instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ONCE_ONLY)


class _RowStatisticsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, candidates: Tensor | None, scale: Tensor, outside: Tensor | None, plan: Plan
    ) -> Any:
        ctx.set_materialize_grads(False)
        result = compute(x, candidates, scale, outside, plan)
        # Saved with save_for_backward: autograd refuses a backward after a change in place.
        ctx.plan = plan.with_tensors((None,) * len(plan.tensors))
        ctx.save_for_backward(x, candidates, scale, outside, *result[:2], *plan.tensors)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, candidates, scale, outside, n, p, *tensors = ctx.saved_tensors
        plan = ctx.plan.with_tensors(tensors)
        with torch.no_grad():
            batched = any(grad is not None and is_batched(grad) for grad in grads)  # is_grads_batched=True
            differentiate = custom_op.gradients if batched else gradients
            needs = ctx.needs_input_grad
            result = differentiate(plan, x, candidates, scale, outside, n, p, grads, needs)
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in (x, candidates, scale, outside, *grads) if tensor is not None]
            return *(None if grad is None else RefuseSecond.apply(grad, *inputs) for grad in result), None
        return *result, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


def row_statistics(
    x: Tensor, candidates: Tensor | None, scale: Tensor, outside: Tensor | None, plan: Plan
) -> RowStatistics:
    """Computes the statistics of every anchor, differentiable once with respect to the tensors.

    Args:
        x: anchors [M, D].
        candidates: [N, D]; None: the anchors.
        scale: 1 / temperature, no dimensions, in the statistics dtype.
        outside: [M], logsumexp of negatives that are not among the candidates; None: there are none.
        plan: what to compute.
    """
    result: tuple[Tensor | None, ...]
    if is_eager(x):
        result = _RowStatisticsFunction.apply(x, candidates, scale, outside, plan)
    else:
        result = custom_op.row_statistics(x, candidates, scale, outside, plan)
    return RowStatistics(*(scale if value is None else value for value in result))
