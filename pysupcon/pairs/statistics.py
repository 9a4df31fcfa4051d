"""Which statistics a loss needs of its anchors, and how a backend computes them and their gradients.

A :class:`Plan` comes from :mod:`pysupcon.pairs.problem`. :func:`compute` and :func:`gradients` call the
operators of its backend; they know no autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import ops, tiled

__all__ = [
    "OPERATORS",
    "Memory",
    "Operands",
    "Pairing",
    "Plan",
    "RowStatistics",
    "compute",
    "gradients",
    "memory_operands",
    "operands",
    "row_products",
]

OPERATORS: dict[str, Any] = {"cpu": ops, "cuda": ops, "tiled": tiled}
"""Modules that implement the operators, by backend."""


class Pairing(NamedTuple):
    """Index arguments of the operators: positives, instances, and log weights of the candidates (see
    :mod:`pysupcon.pairs.ops`)."""

    labels: Tensor
    order: Tensor
    candidate_labels: Tensor | None = None
    candidate_order: Tensor | None = None
    self_index: Tensor | None = None
    instances: Tensor | None = None
    candidate_instances: Tensor | None = None
    log_weights: Tensor | None = None
    candidate_log_weights: Tensor | None = None


class Memory(NamedTuple):
    """Rows that the anchors are contrasted with in addition to the candidates; they get no gradient."""

    rows: Tensor
    """[Nm, D], dtype of the anchors"""
    labels: Tensor
    order: Tensor
    instances: Tensor | None = None
    """given if the pairing has instances"""
    log_weights: Tensor | None = None


class Operands(NamedTuple):
    """Arguments of the operators for the anchors and one set of candidates."""

    rows: tuple[Any, ...]
    """the first eight arguments of every operator"""
    pairing: Pairing
    negatives: bool
    """whether candidates of other labels are negatives"""
    mask_arguments: dict[str, tiled.PositiveMask]

    @property
    def of_statistics(self) -> tuple[Any, ...]:
        """Arguments of pair_stats and its backward up to the statistics."""
        return *self.rows, *self.pairing[5:]

    @property
    def of_softplus(self) -> tuple[Any, ...]:
        """Arguments of positive_softplus and its backward up to n."""
        return *self.rows, *self.pairing[7:]


class Plan(NamedTuple):
    """What to compute, and with which backend."""

    backend: str
    pairing: Pairing
    mask: tiled.PositiveMask | None = None
    negatives: bool = True
    positives: bool = True
    epsilon: float | Tensor | None = None
    """None: no softplus sum. :mod:`pysupcon.pairs.custom_op` gives a tensor of no dimensions."""
    memory: Memory | None = None
    batch_negatives: bool = True
    """False: only the memory (and pairs outside of this plan) are negatives"""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Tensors for ``save_for_backward``, some of them None. Some may belong to the caller."""
        mask = self.mask or (None,) * len(tiled.PositiveMask._fields)
        return *self.pairing, *mask, *(self.memory or (None,) * len(Memory._fields))

    def with_tensors(self, tensors: Sequence[Any]) -> Plan:
        """Returns the plan with other :attr:`tensors`, in the same order."""
        first = len(Pairing._fields)
        second = first + len(tiled.PositiveMask._fields)
        mask = None if self.mask is None else tiled.PositiveMask(*tensors[first:second])
        memory = None if self.memory is None else Memory(*tensors[second:])
        return self._replace(pairing=Pairing(*tensors[:first]), mask=mask, memory=memory)

    def blocks(self, x: Tensor, candidates: Tensor | None, scale: Tensor) -> list[Operands]:
        """Returns the candidates, then the memory."""
        pairing, memory = self.pairing, self.memory
        mask = {} if self.mask is None else {"mask": self.mask}
        first = operands(x, candidates, scale, pairing)
        blocks = [Operands(first, pairing, self.negatives and self.batch_negatives, mask)]
        if memory is not None:
            anchors = pairing.labels, pairing.order, pairing.instances
            blocks.append(memory_operands(x, scale, anchors, memory, self.negatives))
        return blocks


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
    """Returns the first eight arguments of every operator."""
    return (x, pairing.labels, pairing.order, scale, candidates, *pairing[2:5])


def memory_operands(
    x: Tensor, scale: Tensor, anchors: tuple[Tensor, Tensor, Tensor | None], memory: Memory, negatives: bool
) -> Operands:
    """Returns the arguments of the operators for the anchors and the memory.

    Args:
        x: anchors [M, D].
        scale: 1 / temperature.
        anchors: their labels, order and instances.
        memory: its instances are given if those of the anchors are.
        negatives: whether its rows of other labels are negatives.
    """
    labels, order, instances = anchors
    pairing = Pairing(
        labels, order, memory.labels, memory.order, None, instances, memory.instances, None,
        memory.log_weights,
    )  # fmt: skip
    return Operands(operands(x, memory.rows, scale, pairing), pairing, negatives, {})


class NegativeMean(NamedTuple):
    """What the forward leaves of a block without gradient, in place of a second pass over its negatives."""

    mean: Tensor
    """sum over the block's negatives of w_j e^(s_ij - n_i) c_j, [M, D]"""
    n: Tensor
    """n of the block alone, [M]"""

    def add_to(self, grad_x: Tensor, grad_n: Tensor, n: Tensor, scale: Tensor) -> None:
        """Adds the gradient through the block's negatives to ``grad_x``.

        Args:
            grad_x: [M, D].
            grad_n: dL/dn [M].
            n: of all blocks, [M].
            scale: 1 / temperature.
        """
        share = torch.where(self.n == -math.inf, 0.0, (self.n - n).exp())
        grad_x.addcmul_(self.mean, (scale * share * grad_n).to(grad_x.dtype).unsqueeze(1))


def choose_means(plan: Plan, candidates: Tensor | None, needs: Sequence[bool]) -> list[bool]:
    """Returns for each block of the plan whether the forward computes its :class:`NegativeMean`.

    Candidates without a gradient then cost 4 instead of 6 units of M N D operations, forward and backward.

    Args:
        plan: of the statistics.
        candidates: [N, D]; None: the anchors.
        needs: as in :func:`gradients`.
    """
    possible = plan.backend == "cpu" and plan.negatives and (needs[0] or needs[2])
    separate = candidates is not None and not needs[1] and plan.batch_negatives
    return [possible and separate, possible][: 1 if plan.memory is None else 2]


def compute(
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    outside: Tensor | None,
    plan: Plan,
    with_means: Sequence[bool] | None = None,
) -> tuple[tuple[Tensor | None, ...], list[NegativeMean | None]]:
    """Computes the fields of :class:`RowStatistics`.

    Args:
        x: anchors [M, D].
        candidates: [N, D]; None: the anchors.
        scale: 1 / temperature, no dimensions, in the statistics dtype.
        outside: [M], logsumexp of negatives that are not among the candidates; None: there are none.
        plan: what to compute.
        with_means: of :func:`choose_means`; None: no means.

    Returns:
        n, p, positive_sum, instance_sum and softplus, of which the last two are None if the plan does not
        request them; and for each block of the plan the mean of its negatives, or None.
    """
    operators = OPERATORS[plan.backend]
    blocks = plan.blocks(x, candidates, scale)
    means: list[NegativeMean | None] = []
    parts = []
    for block, with_mean in zip(blocks, with_means or [False] * len(blocks), strict=True):
        buffer = {"negative_mean": ops.zero_gradients(x)} if with_mean else {}
        try:
            part = operators.pair_stats(
                *block.of_statistics, block.negatives, plan.positives, **buffer, **block.mask_arguments
            )
        except ValueError as error:
            raise error if block is blocks[0] else _about_memory(error) from None
        means.append(NegativeMean(buffer["negative_mean"], part[0]) if with_mean else None)
        parts.append(part)
    n, p, positive_sum, instance_sum = parts[0]
    for part in parts[1:]:
        n, p = torch.logaddexp(n, part[0]), torch.logaddexp(p, part[1])  # -inf if both are -inf
        positive_sum, instance_sum = positive_sum + part[2], instance_sum + part[3]
    if outside is not None and plan.negatives:
        n = torch.logaddexp(n, outside)
    softplus = None
    if plan.epsilon is not None:
        limit = _limit(n, plan.epsilon)
        for block in blocks:
            part = operators.positive_softplus(*block.of_softplus, *limit, **block.mask_arguments)
            softplus = part if softplus is None else softplus + part
    return (
        (n, p, positive_sum, None if plan.pairing.instances is None else instance_sum, softplus),
        means,
    )


def _about_memory(error: ValueError) -> ValueError:
    """Returns an error of an operator whose candidates are the memory, with the memory's name."""
    text = str(error)
    if " candidate rows" in text:
        text = text.replace("features must", "memory must").replace(" candidate rows", " rows")
    return ValueError(text)


def _limit(n: Tensor, epsilon: float | Tensor) -> tuple[Tensor, float]:
    """Returns n and epsilon as operators take them, which use n + epsilon only: a tensor is added here."""
    return (n + epsilon, 0.0) if isinstance(epsilon, Tensor) else (n, epsilon)


class _ScaleGradient:
    """dL/dscale = sum_ij G_ij s_ij / scale, from what each operator adds to ``grad_x``.

    sum_i x_i . dL/dx_i = sum_ij G_ij s_ij; without candidates (G_ij + G_ji) counts every pair twice.
    """

    def __init__(self, x: Tensor, grad_x: Tensor, scale: Tensor, wanted: bool) -> None:
        self.x, self.grad_x, self.scale, self.wanted = x, grad_x, scale, wanted
        if wanted:
            self.total = self.before = torch.zeros_like(scale)

    def add(self, block: Operands) -> None:
        """Adds what an operator has added to ``grad_x`` for this block since the last call."""
        if self.wanted:
            product = row_products(self.x, self.grad_x, self.scale.dtype)
            self.total = self.total + (product - self.before) / (2 if block.rows[4] is None else 1)
            self.before = product

    @property
    def value(self) -> Tensor | None:
        return self.total / self.scale if self.wanted else None


def gradients(
    plan: Plan,
    x: Tensor,
    candidates: Tensor | None,
    scale: Tensor,
    outside: Tensor | None,
    n: Tensor,
    p: Tensor,
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    means: Sequence[NegativeMean | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of :func:`compute`.

    Args:
        plan: and ``x``, ``candidates``, ``scale``, ``outside``: as in :func:`compute`.
        n: as :func:`compute` returned it, like ``p``.
        grads: upstream gradients of the fields of :class:`RowStatistics`, [M]; None: zero.
        needs: which of dL/dx, dL/dcandidates, dL/dscale and dL/doutside are needed.
        means: of :func:`compute`; None: every block needs a pass over its negatives.

    Returns:
        dL/dx, dL/dcandidates, dL/dscale and dL/doutside; None if not needed.
    """
    operators = OPERATORS[plan.backend]
    grad_n, grad_p, grad_positive_sum, grad_instance_sum, grad_softplus = grads
    blocks = plan.blocks(x, candidates, scale)
    grad_x = ops.zero_gradients(x)
    grad_candidates = ops.zero_gradients(candidates) if candidates is not None and needs[1] else None
    outputs = [(grad_x, grad_candidates), *[(grad_x, None)] * (len(blocks) - 1)]
    # Pairs of one set count twice, so with several blocks each operator's part is added on its own.
    grad_scale = _ScaleGradient(x, grad_x, scale, needs[2])
    several = len(blocks) > 1
    if grad_softplus is not None:
        assert plan.epsilon is not None
        for block, output in zip(blocks, outputs, strict=True):
            through_n = operators.positive_softplus_backward(
                *block.of_softplus, *_limit(n, plan.epsilon), grad_softplus, None, None, *output,
                **block.mask_arguments,
            )  # fmt: skip
            grad_n = through_n if grad_n is None else grad_n + through_n
            if several:
                grad_scale.add(block)
    need_positives = any(grad is not None for grad in (grad_p, grad_positive_sum, grad_instance_sum))
    upstream = (
        torch.zeros_like(n) if grad_n is None else grad_n,
        torch.zeros_like(p) if grad_p is None else grad_p,
        grad_positive_sum,
        grad_instance_sum if plan.pairing.instances is not None else None,
    )
    for block, output, mean in zip(blocks, outputs, means or [None] * len(blocks), strict=True):
        need_negatives = grad_n is not None and block.negatives
        if mean is not None and need_negatives:
            mean.add_to(grad_x, upstream[0], n, scale)
            need_negatives = False
        if need_negatives or need_positives:
            operators.pair_stats_backward(
                *block.of_statistics, n, p, *upstream, *(None,) * 6, need_negatives, need_positives, *output,
                **block.mask_arguments,
            )  # fmt: skip
        if several or block is blocks[-1]:
            grad_scale.add(block)
    grad_outside = None
    if outside is not None and needs[3]:
        share = torch.where(outside == -math.inf, 0.0, (outside - n).exp())
        grad_outside = share * upstream[0] if plan.negatives else torch.zeros_like(outside)
    # The parts cancel as a loss converges, so they are rounded only here, after they were added.
    return (
        grad_x.to(x.dtype) if needs[0] else None,
        None if grad_candidates is None or candidates is None else grad_candidates.to(candidates.dtype),
        grad_scale.value,
        grad_outside,
    )


def row_products(x: Tensor, y: Tensor, dtype: torch.dtype, chunk: int = 65536) -> Tensor:
    """Returns the sum of x * y in ``dtype``, without a copy of all rows."""
    total = torch.zeros((), dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], chunk):
        total += (x[start : start + chunk].to(dtype) * y[start : start + chunk]).sum()
    return total
