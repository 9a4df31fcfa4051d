"""The differentiable step of every loss: from rows to statistics per anchor.

:func:`row_statistics` computes per-anchor statistics with the operators of a backend; its backward recomputes
the pairs. All later steps of a loss are O(N) and ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs import opaque
from pysupcon.pairs.modes import NO_FORWARD_MODE, ONCE_ONLY, batched, runs_plainly
from pysupcon.pairs.statistics import Plan, RowStatistics, compute, gradients

__all__ = ["RefuseSecond", "RowStatistics", "row_statistics"]


class RefuseSecond(torch.autograd.Function):
    """Passes gradients through; a second differentiation meets an error instead of silent zeros."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *reasons: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ONCE_ONLY)


class _RowStatisticsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> Any:
        ctx.set_materialize_grads(False)
        result = compute(x, candidates, scale, plan)
        # Saved, not kept aside: autograd sees to it that nobody changes them before the backward.
        ctx.plan = plan.with_tensors((None,) * len(plan.tensors))
        ctx.save_for_backward(x, candidates, scale, *result[:2], *plan.tensors)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, candidates, scale, n, p, *tensors = ctx.saved_tensors
        plan = ctx.plan.with_tensors(tensors)
        with torch.no_grad():
            if any(grad is not None and batched(grad) for grad in grads):  # by is_grads_batched
                result = opaque.gradients(plan, x, candidates, scale, n, p, grads, ctx.needs_input_grad)
            else:
                result = gradients(plan, x, candidates, scale, n, p, grads, ctx.needs_input_grad)
        if torch.is_grad_enabled():
            reasons = [tensor for tensor in (x, candidates, scale, *grads) if tensor is not None]
            return *(None if grad is None else RefuseSecond.apply(grad, *reasons) for grad in result), None
        return *result, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


def row_statistics(x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> RowStatistics:
    """Statistics of every anchor, differentiable once with respect to ``x`` [M, D], ``candidates`` [N, D] or
    None and ``scale`` (1 / temperature, no dimensions, in the backend's statistics dtype)."""
    result: tuple[Tensor | None, ...]
    if runs_plainly(x):
        result = _RowStatisticsFunction.apply(x, candidates, scale, plan)
    else:
        result = opaque.row_statistics(x, candidates, scale, plan)
    return RowStatistics(*(scale if value is None else value for value in result))
