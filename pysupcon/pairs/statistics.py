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
"""Modules that implement the operators, by backend."""


class Pairing(NamedTuple):
    """Columns of the operators: positives, instances and log weights (see :mod:`pysupcon.pairs.ops`)."""

    labels: Tensor
    order: Tensor
    candidate_labels: Tensor | None = None
    candidate_order: Tensor | None = None
    self_index: Tensor | None = None
    instances: Tensor | None = None
    candidate_instances: Tensor | None = None
    log_weights: Tensor | None = None
    candidate_log_weights: Tensor | None = None


class Plan(NamedTuple):
    """What to compute, and with which backend."""

    backend: str
    pairing: Pairing
    mask: tiled.PositiveMask | None = None
    negatives: bool = True
    positives: bool = True
    epsilon: float | Tensor | None = None
    """None: no softplus sum. :mod:`pysupcon.pairs.custom_op` gives a tensor of no dimensions."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Tensors for ``save_for_backward``, some of them None. Some may belong to the caller."""
        return (*self.pairing, *(self.mask or (None,) * len(tiled.PositiveMask._fields)))

    def with_tensors(self, tensors: Sequence[Any]) -> Plan:
        """Returns the plan with other :attr:`tensors`, in the same order."""
        size = len(Pairing._fields)
        mask = None if self.mask is None else tiled.PositiveMask(*tensors[size:])
        return self._replace(pairing=Pairing(*tensors[:size]), mask=mask)

    @property
    def mask_arguments(self) -> dict[str, tiled.PositiveMask]:
        return {} if self.mask is None else {"mask": self.mask}


class RowStatistics(NamedTuple):
    """Statistics per anchor, each [M] in :func:`pysupcon.pairs.ops.stats_dtype`.

    Those that the plan does not request are undefined.
    """

    n: Tensor
    """log sum over negatives of e^s; -inf if there is none"""
    p: Tensor
    """log sum over positives of e^s; -inf if there is none"""
    positive_sum: Tensor
    """sum over positives of s"""
    instance_sum: Tensor
    """sum of s over the positives of the anchor's instance"""
    softplus: Tensor
    """sum over positives of softplus(n - s + epsilon)"""

    def without_instances(self) -> RowStatistics:
        """Sets instance_sum if every positive has the anchor's instance."""
        return self._replace(instance_sum=self.positive_sum)

    def with_one_sum(self) -> RowStatistics:
        """Merges the gradients of both sums if every positive has the anchor's instance."""
        total = self.positive_sum + self.instance_sum
        return self._replace(positive_sum=total, instance_sum=torch.zeros_like(total))


def operands(x: Tensor, candidates: Tensor | None, scale: Tensor, pairing: Pairing) -> tuple[Any, ...]:
    """Returns the first eight arguments of every operator. ``pairing[5:]`` are further ones of pair_stats,
    ``pairing[7:]`` of positive_softplus."""
    return (x, pairing.labels, pairing.order, scale, candidates, *pairing[2:5])


def compute(x: Tensor, candidates: Tensor | None, scale: Tensor, plan: Plan) -> tuple[Tensor | None, ...]:
    """Computes the fields of :class:`RowStatistics`.

    Args:
        x: anchors [M, D].
        candidates: [N, D]; None: the anchors.
        scale: 1 / temperature, no dimensions, in the statistics dtype.
        plan: what to compute.

    Returns:
        n, p, positive_sum, instance_sum and softplus; the last two are None if the plan does not request
        them.
    """
    operators, pairing = OPERATORS[plan.backend], plan.pairing
    rows = operands(x, candidates, scale, pairing)
    n, p, positive_sum, instance_sum = operators.pair_stats(
        *rows, *pairing[5:], plan.negatives, plan.positives, **plan.mask_arguments
    )
    softplus = None
    if plan.epsilon is not None:
        softplus = operators.positive_softplus(
            *rows, *pairing[7:], *_limit(n, plan.epsilon), **plan.mask_arguments
        )
    return n, p, positive_sum, None if pairing.instances is None else instance_sum, softplus


def _limit(n: Tensor, epsilon: float | Tensor) -> tuple[Tensor, float]:
    """Returns n and epsilon as operators take them, which use n + epsilon only: a tensor is added here."""
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
    """Computes the gradients of :func:`compute`.

    Args:
        plan: and ``x``, ``candidates``, ``scale``: as in :func:`compute`.
        n: as :func:`compute` returned it, like ``p``.
        grads: upstream gradients of the fields of :class:`RowStatistics`, [M]; None: zero.
        needs: which of dL/dx, dL/dcandidates and dL/dscale are needed.

    Returns:
        dL/dx, dL/dcandidates and dL/dscale; None if not needed.
    """
    operators = OPERATORS[plan.backend]
    grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus = grads
    rows = operands(x, candidates, scale, plan.pairing)
    grad_x = ops.zero_gradients(x)
    grad_candidates = ops.zero_gradients(candidates) if candidates is not None and needs[1] else None
    outputs = grad_x, grad_candidates
    if grad_softplus is not None:
        assert plan.epsilon is not None
        through_n = operators.positive_softplus_backward(
            *rows,
            *plan.pairing[7:],
            *_limit(n, plan.epsilon),
            grad_softplus,
            None,
            None,
            *outputs,
            **plan.mask_arguments,
        )
        grad_n = through_n if grad_n is None else grad_n + through_n
    need_positives = any(grad is not None for grad in (grad_p, grad_positive_sum, grad_instance_sum))
    if grad_n is not None or need_positives:
        upstream = (
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
            *upstream,
            *(None,) * 6,
            grad_n is not None,
            need_positives,
            *outputs,
            **plan.mask_arguments,
        )
    grad_scale = None
    if needs[2]:
        # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij: without candidates every pair counts twice.
        twice = 2 if candidates is None else 1
        grad_scale = row_products(x, grad_x, scale.dtype) / (twice * scale)
    # The parts cancel as a loss converges, so they are rounded only here, after they were added.
    return (
        grad_x.to(x.dtype) if needs[0] else None,
        None if grad_candidates is None or candidates is None else grad_candidates.to(candidates.dtype),
        None if grad_scale is None else grad_scale.to(scale.dtype),
    )


def row_products(x: Tensor, y: Tensor, dtype: torch.dtype, chunk: int = 65536) -> Tensor:
    """Returns the sum of x * y in ``dtype``, without a copy of all rows."""
    total = torch.zeros((), dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], chunk):
        total += (x[start : start + chunk].to(dtype) * y[start : start + chunk]).sum()
    return total
