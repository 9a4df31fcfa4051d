"""Which statistics a loss needs of its anchors, and how a backend computes them and their gradients.

A :class:`Plan` comes from :mod:`pysupcon.pairs.problem`. :func:`compute` and :func:`gradients` call the
operators of its backend; they know no autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import ops, tiled

__all__ = [
    "OPERATORS",
    "Pairing",
    "Plan",
    "RowStatistics",
    "compute",
    "gradients",
    "operands",
    "row_products",
]

OPERATORS: dict[str, Any] = {"cpu": ops, "cuda": ops, "tiled": tiled}
"""Modules that offer the operators, by backend."""


class Pairing(NamedTuple):
    """Who is whose positive, and which positives are of one instance: the index arguments of the operators
    (see :mod:`pysupcon.pairs.ops`)."""

    labels: Tensor
    order: Tensor
    candidate_labels: Tensor | None = None
    candidate_order: Tensor | None = None
    self_index: Tensor | None = None
    instances: Tensor | None = None
    candidate_instances: Tensor | None = None


class Plan(NamedTuple):
    """What to compute and how."""

    backend: str
    pairing: Pairing
    mask: tiled.PositiveMask | None = None
    negatives: bool = True
    positives: bool = True
    epsilon: float | Tensor | None = None
    """a number, or (:mod:`pysupcon.pairs.opaque`) a tensor of no dimensions in the dtype of the statistics"""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, some None: what autograd must keep for a backward. Some may be the caller's own."""
        return (*self.pairing, *(self.mask or (None,) * len(tiled.PositiveMask._fields)))

    def with_tensors(self, tensors: Sequence[Any]) -> Plan:
        """The same plan of other :attr:`tensors`, in their order."""
        size = len(Pairing._fields)
        mask = None if self.mask is None else tiled.PositiveMask(*tensors[size:])
        return self._replace(pairing=Pairing(*tensors[:size]), mask=mask)

    @property
    def mask_arguments(self) -> dict[str, tiled.PositiveMask]:
        return {} if self.mask is None else {"mask": self.mask}


class RowStatistics(NamedTuple):
    """Per anchor, [M] each, in the backend's statistics dtype; anything where the plan does not ask."""

    n: Tensor
    """log sum over negatives of e^s; -inf where there is none"""
    p: Tensor
    """log sum over positives of e^s; -inf where there is none"""
    positive_sum: Tensor
    """sum over positives of s"""
    instance_sum: Tensor
    """sum of s over the positives of the anchor's instance"""
    softplus: Tensor
    """sum over positives of softplus(n - s + epsilon)"""

    def without_instances(self) -> RowStatistics:
        """Every positive is of the anchor's instance."""
        return self._replace(instance_sum=self.positive_sum)

    def with_one_sum(self) -> RowStatistics:
        """Of gradients: the two sums are one, whose gradient is that of both."""
        total = self.positive_sum + self.instance_sum
        return self._replace(positive_sum=total, instance_sum=torch.zeros_like(total))


def operands(x: Tensor, candidates: Tensor | None, scale: Tensor, pairing: Pairing) -> tuple[Any, ...]:
    """The first eight arguments of every operator; pair_stats has the rest of the pairing, too."""
    return (x, pairing.labels, pairing.order, scale, candidates, *pairing[2:5])


def compute(x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> tuple[Tensor | None, ...]:
    """The parts of :class:`RowStatistics`; instance_sum and softplus None if the plan does not ask."""
    operators, pairing = OPERATORS[plan.backend], plan.pairing
    rows = operands(x, candidates, scale, pairing)
    n, p, positive_sum, instance_sum = operators.pair_stats(
        *rows, *pairing[5:], plan.negatives, plan.positives, **plan.mask_arguments
    )
    softplus = None
    if plan.epsilon is not None:
        softplus = operators.positive_softplus(*rows, *_limit(n, plan.epsilon), **plan.mask_arguments)
    return n, p, positive_sum, None if pairing.instances is None else instance_sum, softplus


def _limit(n: Tensor, epsilon: float | Tensor) -> tuple[Tensor, float]:
    """n and epsilon as operators take them. They see n + epsilon only: a tensor is added here."""
    return (n + epsilon, 0.0) if isinstance(epsilon, Tensor) else (n, epsilon)


def gradients(
    plan: Plan,
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dL/dx, dL/dcandidates, dL/dscale, None where not needed, from the upstream gradients of
    :class:`RowStatistics`, None where the loss does not depend on a statistic."""
    operators = OPERATORS[plan.backend]
    grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus = grads
    rows = operands(x, candidates, scale, plan.pairing)
    grad_x = ops.zero_gradients(x)
    grad_candidates = ops.zero_gradients(candidates) if candidates is not None and needs[1] else None
    into = grad_x, grad_candidates
    if grad_softplus is not None:
        assert plan.epsilon is not None
        through_n = operators.positive_softplus_backward(
            *rows, *_limit(n, plan.epsilon), grad_softplus, None, None, *into, **plan.mask_arguments
        )
        grad_n = through_n if grad_n is None else grad_n + through_n
    of_positives = any(grad is not None for grad in (grad_p, grad_positive_sum, grad_instance_sum))
    if grad_n is not None or of_positives:
        own = (
            torch.zeros_like(n) if grad_n is None else grad_n,
            torch.zeros_like(p) if grad_p is None else grad_p,
            grad_positive_sum,
            grad_instance_sum if plan.pairing.instances is not None else None,
        )
        operators.pair_stats_backward(
            *rows,
            *plan.pairing[5:],
            n,
            p,
            *own,
            *(None,) * 6,
            grad_n is not None,
            of_positives,
            *into,
            **plan.mask_arguments,
        )
    grad_scale = None
    if needs[2]:
        # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij: every pair twice where the anchors are candidates.
        twice = 2 if candidates is None else 1
        grad_scale = row_products(x, grad_x, scale.dtype) / (twice * scale)
    # The parts cancel as a loss converges: they were added before they are rounded here.
    return (
        grad_x.to(x.dtype) if needs[0] else None,
        None if grad_candidates is None or candidates is None else grad_candidates.to(candidates.dtype),
        None if grad_scale is None else grad_scale.to(scale.dtype),
    )


def row_products(x: Tensor, y: Tensor, dtype: torch.dtype, chunk: int = 65536) -> Tensor:
    """sum of x * y in ``dtype``, without a copy of the rows."""
    total = torch.zeros((), dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], chunk):
        total += (x[start : start + chunk].to(dtype) * y[start : start + chunk]).sum()
    return total
