"""The one differentiable step of every loss: from rows to what is kept per anchor.

:func:`row_statistics` turns embeddings into per-anchor statistics through the six operators of a backend; its
backward recomputes the pairs. Everything after it is O(N) and ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, tiled

__all__ = ["OPERATORS", "Pairing", "Plan", "RowStatistics", "row_statistics"]

OPERATORS: dict[str, Any] = {"cpu": _ops, "cuda": _ops, "tiled": tiled}
"""Modules that offer the six operators, by backend."""


class Pairing(NamedTuple):
    """Who is whose positive: the index arguments of the operators (see :mod:`pysupcon._ops`)."""

    labels: Tensor
    order: Tensor
    candidate_labels: Tensor | None
    candidate_order: Tensor | None
    self_index: Tensor | None


class Plan(NamedTuple):
    """What to compute and how."""

    backend: str
    pairing: Pairing
    instances: Pairing | None = None
    mask: tiled.PositiveMask | None = None
    negatives: bool = True
    positives: bool = True
    denominator: bool = False
    """One sum over positives and negatives, in place of n and p."""
    epsilon: float | None = None
    positive_sum: bool = False

    @property
    def apart(self) -> bool:
        """Whether the pairs' labels do not matter (those of a mask do: it says who is what)."""
        return self.denominator and self.mask is None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, some None: what autograd must keep for a backward. Some may be the caller's own."""
        nothing = (None,) * 5
        return (*self.pairing, *(self.instances or nothing), *(self.mask or nothing[:3]))

    def with_tensors(self, tensors: Sequence[Any]) -> Plan:
        """The same plan of other :attr:`tensors`, in their order."""
        return self._replace(
            pairing=Pairing(*tensors[:5]),
            instances=None if self.instances is None else Pairing(*tensors[5:10]),
            mask=None if self.mask is None else tiled.PositiveMask(*tensors[10:]),
        )

    @property
    def mask_arguments(self) -> dict[str, tiled.PositiveMask]:
        return {} if self.mask is None else {"mask": self.mask}


class RowStatistics(NamedTuple):
    """Per anchor, [M] each, in the backend's statistics dtype; anything where the plan does not ask."""

    n: Tensor
    """log sum over negatives of e^s; -inf where there is none"""
    p: Tensor
    """log sum over positives of e^s; -inf where there is none"""
    softplus: Tensor
    """sum over positives of softplus(n - s + epsilon)"""
    positive_sum: Tensor
    """sum over positives of s"""
    instance_sum: Tensor
    """sum of s over the other rows of the anchor's instance"""
    denominator: Tensor | None = None
    """log sum over all candidates of e^s; -inf where there is none"""


class _RefuseSecond(torch.autograd.Function):
    """Passes gradients through; a second differentiation meets an error instead of silent zeros."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *reasons: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "pysupcon's losses can be differentiated once only: autograd cannot follow how their gradient "
            'depends on its inputs; backend="reference" (dense, small batches) supports second derivatives'
        )


def _apart(x: Tensor, pairing: Pairing) -> Pairing:
    """Every row in a class of its own: positives and negatives of an anchor, all but itself, are then its
    negatives, in the order in which they lie in memory. No pair asks for its labels, a row has one sum."""
    anchors = torch.arange(x.shape[0], device=x.device)
    if pairing.candidate_labels is None:
        return Pairing(anchors, anchors, None, None, None)
    candidates = torch.arange(pairing.candidate_labels.shape[0], device=x.device)
    own = pairing.self_index
    if own is None:
        return Pairing(torch.full_like(anchors, -1), anchors, candidates, candidates, None)
    return Pairing(own, torch.argsort(own, stable=True), candidates, candidates, own)


def _operands(x: Tensor, candidates: Tensor | None, scale: Tensor, pairing: Pairing) -> tuple[Any, ...]:
    """The first eight arguments of every operator."""
    return (x, pairing.labels, pairing.order, scale, candidates, *pairing[2:])


class _RowStatisticsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> Any:
        ctx.plan = plan.with_tensors((None,) * 13)
        ctx.set_materialize_grads(False)
        ops = OPERATORS[plan.backend]
        rows = _operands(x, candidates, scale, plan.pairing)
        n = p = softplus = positive_sum = instance_sum = both = None
        if plan.apart:
            apart = _operands(x, candidates, scale, _apart(x, plan.pairing))
            both, _ = ops.pair_stats(*apart, True, False)
        elif plan.negatives or plan.positives:
            n, p = ops.pair_stats(*rows, plan.negatives, plan.positives, **plan.mask_arguments)
            if plan.denominator:
                both, n, p = torch.logaddexp(n, p), None, None
        if plan.epsilon is not None:
            softplus = ops.positive_softplus(*rows, n, plan.epsilon, **plan.mask_arguments)
        if plan.positive_sum:
            positive_sum = ops.positive_sum(*rows, **plan.mask_arguments)
        if plan.instances is not None:
            instance_sum = ops.positive_sum(*_operands(x, candidates, scale, plan.instances))
        statistics = (both, both) if plan.denominator else (n, p)
        ctx.save_for_backward(x, candidates, scale, *statistics, *plan.tensors)
        return n, p, softplus, positive_sum, instance_sum, both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, candidates, scale, n, p, *tensors = ctx.saved_tensors
        plan = ctx.plan.with_tensors(tensors)
        needs = ctx.needs_input_grad
        with torch.no_grad():
            result = _gradients(plan, x, candidates, scale, n, p, grads, needs)
            # The parts cancel as a loss converges: they were added before they are rounded here.
            dtypes = x.dtype, None if candidates is None else candidates.dtype, scale.dtype
            result = tuple(
                None if grad is None else grad.to(dtype) for grad, dtype in zip(result, dtypes, strict=True)
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            reasons = [tensor for tensor in (x, candidates, scale, *grads) if tensor is not None]
            return *(None if grad is None else _RefuseSecond.apply(grad, *reasons) for grad in result), None
        return *result, None


def _gradients(
    plan: Plan,
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dL/dx, dL/dcandidates, dL/dscale from the upstream gradients of :class:`RowStatistics`, None where the
    loss does not depend on a statistic."""
    ops = OPERATORS[plan.backend]
    grad_n, grad_p, grad_softplus, grad_positive_sum, grad_instance_sum, grad_both = grads
    if plan.denominator:  # G_ij = grad_both_i e^(s_ij - both_i), whatever j is
        grad_n = grad_p = grad_both
    rows = _operands(x, candidates, scale, plan.pairing)
    grad_x = _ops.zero_gradients(x)
    grad_candidates = _ops.zero_gradients(candidates) if candidates is not None and needs[1] else None
    into = grad_x, grad_candidates
    if grad_softplus is not None:
        through_n = ops.positive_softplus_backward(
            *rows, n, plan.epsilon, grad_softplus, None, None, *into, **plan.mask_arguments
        )
        grad_n = through_n if grad_n is None else grad_n + through_n
    if grad_n is not None or grad_p is not None:
        grad_n = torch.zeros_like(n) if grad_n is None else grad_n
        grad_p = torch.zeros_like(p) if grad_p is None else grad_p
        pairs, kinds = rows, (plan.negatives, plan.positives)
        if plan.apart:
            pairs, kinds = _operands(x, candidates, scale, _apart(x, plan.pairing)), (True, False)
        ops.pair_stats_backward(
            *pairs, n, p, grad_n, grad_p, None, None, None, None, *kinds, *into, **plan.mask_arguments
        )
    if grad_positive_sum is not None:
        ops.positive_sum_backward(*rows, grad_positive_sum, None, *into, **plan.mask_arguments)
    if grad_instance_sum is not None:
        assert plan.instances is not None
        same_instance = _operands(x, candidates, scale, plan.instances)
        ops.positive_sum_backward(*same_instance, grad_instance_sum, None, *into)
    grad_scale = None
    if needs[2]:
        # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij: every pair twice where the anchors are candidates.
        twice = 2 if candidates is None else 1
        grad_scale = _row_products(x, grad_x, scale.dtype) / (twice * scale)
    return (grad_x if needs[0] else None), grad_candidates, grad_scale


def _row_products(x: Tensor, y: Tensor, dtype: torch.dtype, chunk: int = 65536) -> Tensor:
    """sum of x * y in ``dtype``, without a copy of the rows."""
    total = torch.zeros((), dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], chunk):
        total += (x[start : start + chunk].to(dtype) * y[start : start + chunk]).sum()
    return total


def row_statistics(x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> RowStatistics:
    """Statistics of every anchor, differentiable once with respect to ``x`` [M, D], ``candidates`` [N, D] or
    None and ``scale`` (1 / temperature, no dimensions, in the backend's statistics dtype)."""
    result: tuple[Tensor | None, ...] = _RowStatisticsFunction.apply(x, candidates, scale, plan)
    n, p, softplus, positive_sum, instance_sum = (scale if value is None else value for value in result[:5])
    return RowStatistics(n, p, softplus, positive_sum, instance_sum, result[5])
