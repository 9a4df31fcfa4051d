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
from pysupcon.pairs.statistics import (
    NegativeMean,
    Plan,
    RowStatistics,
    choose_means,
    compute,
    gradients,
)

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
        with_means = choose_means(plan, candidates, ctx.needs_input_grad)
        result, means = compute(x, candidates, scale, outside, plan, with_means)
        # Saved with save_for_backward: autograd refuses a backward after a change in place.
        ctx.plan = plan.with_tensors((None,) * len(plan.tensors))
        of_means = (value for mean in means for value in (mean or (None, None)))
        ctx.blocks = len(means)
        ctx.save_for_backward(x, candidates, scale, outside, *result[:2], *plan.tensors, *of_means)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, candidates, scale, outside, n, p, *tensors = ctx.saved_tensors
        size = len(tensors) - 2 * ctx.blocks
        plan = ctx.plan.with_tensors(tensors[:size])
        needs = ctx.needs_input_grad
        with torch.no_grad():
            if any(grad is not None and is_batched(grad) for grad in grads):  # is_grads_batched=True
                result = custom_op.gradients(plan, x, candidates, scale, outside, n, p, grads, needs)
            else:
                pairs = zip(tensors[size::2], tensors[size + 1 :: 2], strict=True)
                means = [None if mean is None else NegativeMean(mean, of) for mean, of in pairs]
                result = gradients(plan, x, candidates, scale, outside, n, p, grads, needs, means)
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
