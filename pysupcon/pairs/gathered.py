"""The differentiable step of every loss if the candidates are the rows of several processes.

The anchors are the rows of this process. The candidates come in blocks: one block with all rows, or one block
per process, passed around a ring. The statistics of the blocks are merged. In the backward each process
receives a few scalars of every other anchor and computes with them the complete gradient of its own rows,
sum_j (G_ij + G_ji) x_j, so no gradient of a row is communicated. This module knows no process group; it uses
the :class:`pysupcon.pairs.global_batch.Communicator` of the problem.

Communicated per anchor in the backward: the upstream gradient g of its loss, and those of n, p and dL/dn that
the loss needs. Each process differentiates the O(N) step from statistics to losses again for all anchors.
Bytes: SupCon, InfoNCE and DCL (g, n, p) 24, cNCE (g, p) 16, SINCERE (g, n, dL/dn) 24, spread (g, n, p) 24,
spread with base SINCERE (g, n, p, dL/dn) 32. The scalars are float64, because the parts of a gradient that
come from them cancel as a loss converges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.agreement import SharedArguments
from pysupcon.pairs.autograd import RefuseSecond
from pysupcon.pairs.checks import check_gather
from pysupcon.pairs.global_batch import Block, GlobalBatch
from pysupcon.pairs.ops import zero_gradients
from pysupcon.pairs.pairing import repeat_per_view, sort_rows
from pysupcon.pairs.problem import Problem, prepare
from pysupcon.pairs.statistics import OPERATORS, RowStatistics, row_products

__all__ = ["RowLoss", "gathered_losses", "gathered_statistics", "prepare_gathered"]

RowLoss = Callable[[RowStatistics, Tensor, "Tensor | None"], "tuple[Tensor, Tensor]"]
"""(statistics, |P_i|, |A_i|) -> losses per anchor, and a bool mask of the anchors that have one, which
depends on the counts only. The losses are linear in positive_sum, instance_sum and softplus, whose values are
not communicated."""

_NO_WEIGHTS = (None, None)
"""log_weights and candidate_log_weights of the operators"""


class _BlockPairing:
    """Index arguments of the operators for each block. Each block is sorted once per pass."""

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        self._sides: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def _side(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels, order and instances of the rows of samples ``start`` to ``stop``."""
        if (start, stop) not in self._sides:
            ids, views = self.batch.ids[start:stop], self.batch.views
            instances = self.batch.instances
            if instances is not None:
                instances = instances[start:stop]  # ascending with the ids
            order = sort_rows(ids if instances is None else instances, views)[1]
            rows = None if instances is None else repeat_per_view(instances, views)
            self._sides[start, stop] = repeat_per_view(ids, views), order, rows
        return self._sides[start, stop]

    def operands(self, rows: Tensor, scale: Tensor, block: Block) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
        """Returns the first eight arguments of the operators, for the own rows against a block, and the
        instances of both sides."""
        start, stop = self.batch.own_samples
        *own, instances = self._side(start, stop)
        if block.rows is None:
            return (rows, *own, scale, None, None, None, None), (instances, None)
        count = rows.shape[0]
        if block.start <= start and stop <= block.stop:
            first = (start - block.start) * self.batch.views
            self_index = torch.arange(first, first + count, device=rows.device)
        else:
            self_index = torch.full((count,), -1, dtype=torch.int64, device=rows.device)
        *block_side, block_instances = self._side(block.start, block.stop)
        return (rows, *own, scale, block.rows, *block_side, self_index), (instances, block_instances)


class _GatheredPlan:
    """What to compute, and the passes over the blocks.

    Args:
        backend: whose operators to use.
        batch: of all processes.
        loss: from statistics to losses; None: the statistics are the result.
        negatives: as in :meth:`Problem.statistics`, like ``positives`` and ``epsilon``.
    """

    def __init__(
        self,
        backend: str,
        batch: GlobalBatch,
        loss: RowLoss | None,
        negatives: bool = False,
        positives: bool = False,
        epsilon: float | None = None,
    ) -> None:
        self.backend, self.operators = backend, OPERATORS[backend]
        self.batch, self.loss = batch, loss
        self.negatives, self.positives, self.epsilon = negatives, positives, epsilon
        self.pairing = _BlockPairing(batch)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Tensors for ``save_for_backward`` besides rows and statistics."""
        batch = self.batch
        return batch.ids, batch.count, batch.instances, batch.instance_count

    def with_tensors(self, tensors: Sequence[Any]) -> _GatheredPlan:
        """Returns the plan with other :attr:`tensors`, in the same order."""
        ids, count, instances, instance_count = tensors
        batch = replace(self.batch, ids=ids, count=count, instances=instances, instance_count=instance_count)
        return _GatheredPlan(self.backend, batch, self.loss, self.negatives, self.positives, self.epsilon)

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Iterator[Block]:
        """Yields the blocks that hold rows. Closing passes on all remaining blocks, also after an error,
        because the other processes wait for them."""
        with closing(self.batch.communicator.blocks(rows, kept)) as blocks:
            for block in blocks:
                if rows.shape[0] and block.stop > block.start:
                    yield block

    def statistics(self, rows: Tensor, scale: Tensor, kept: Tensor | None) -> RowStatistics:
        """Computes the statistics of the own anchors; those not requested are -inf (n, p) or 0."""
        n = p = scale.new_full((rows.shape[0],), -math.inf)
        positive_sum, instance_sum, softplus = (torch.zeros_like(n) for _ in range(3))
        for block in self.blocks(rows, kept):
            operands, instances = self.pairing.operands(rows, scale, block)
            part = self.operators.pair_stats(
                *operands, *instances, *_NO_WEIGHTS, self.negatives, self.positives
            )
            n, p = torch.logaddexp(n, part[0]), torch.logaddexp(p, part[1])  # -inf if both are -inf
            positive_sum, instance_sum = positive_sum + part[2], instance_sum + part[3]
        if self.epsilon is not None:
            for block in self.blocks(rows, kept):
                operands, _ = self.pairing.operands(rows, scale, block)
                softplus += self.operators.positive_softplus(*operands, *_NO_WEIGHTS, n, self.epsilon)
        statistics = RowStatistics(n, p, positive_sum, instance_sum, softplus)
        return statistics if self.batch.instances is not None else statistics.without_instances()

    def upstream(
        self, n: Tensor, p: Tensor, grads: tuple[Tensor, ...], dtype: torch.dtype
    ) -> tuple[RowStatistics, RowStatistics, Tensor, Tensor]:
        """Exchanges the scalars of the anchors.

        Args:
            n: of the own anchors, like ``p``.
            grads: dL/dlosses, or dL/dstatistics if the plan has no loss, of the own anchors.
            dtype: of the communicated scalars.

        Returns:
            dL/dstatistics of the own anchors and of all anchors; n and p of all anchors.
        """
        batch = self.batch

        def merge_sums(grads: RowStatistics) -> RowStatistics:
            return grads if batch.instances is not None else grads.with_one_sum()

        sent = {"n": n} if self.negatives else {}
        sent |= {"p": p} if self.positives else {}
        if self.loss is None:
            own = merge_sums(RowStatistics(*grads))
            sent |= {"grad_n": own.n, "grad_p": own.p, "grad_positive_sum": own.positive_sum}
        else:
            own = merge_sums(_differentiate(self.loss, n, p, grads[0], *batch.own_counts))
            sent["g"] = grads[0]
        columns = torch.stack([column.to(dtype) for column in sent.values()])
        received = dict(zip(sent, batch.communicator.exchange(columns), strict=True))
        zeros = columns.new_zeros(batch.count.shape)
        empty = torch.full_like(zeros, -math.inf)
        all_n, all_p = received.get("n", empty), received.get("p", empty)
        if self.loss is None:
            all_grads = RowStatistics(*(received.get("grad_" + name, zeros) for name in own._fields))
        else:
            counts = batch.count, batch.instance_count
            all_grads = merge_sums(_differentiate(self.loss, all_n, all_p, received["g"], *counts))
        return own, all_grads, all_n, all_p

    def gradient(
        self,
        rows: Tensor,
        scale: Tensor,
        kept: Tensor | None,
        n: Tensor,
        p: Tensor,
        grads: tuple[Tensor, ...],
    ) -> Tensor:
        """Computes the complete gradient of the own rows [M, D]."""
        operators, batch = self.operators, self.batch
        own, all_grads, all_n, all_p = self.upstream(n, p, grads, scale.dtype)
        # Blocks are added up before the sum is rounded to 16 bits.
        grad_x = zero_gradients(rows)

        def columns_of(block: Block, *columns: Tensor | None) -> list[Tensor | None]:
            """Selects a block's rows; None for the own rows, whose columns the operators have already."""
            if block.rows is None:
                return [None] * len(columns)
            start, stop = block.start * batch.views, block.stop * batch.views
            return [None if column is None else column[start:stop] for column in columns]

        grad_n = own.n
        if self.epsilon is not None:
            for block in self.blocks(rows, kept):
                operands, _ = self.pairing.operands(rows, scale, block)
                columns = columns_of(block, all_n, all_grads.softplus)
                grad_n = grad_n + operators.positive_softplus_backward(
                    *operands, *_NO_WEIGHTS, n, self.epsilon, own.softplus, *columns, grad_x, None
                )
            # dL/dn is complete only after all blocks.
            all_grads = all_grads._replace(n=batch.communicator.exchange(grad_n.unsqueeze(0))[0])
        with_sums = self.positives and batch.instances is not None
        own_sums = own.positive_sum, own.instance_sum if with_sums else None
        all_sums = all_grads.positive_sum, all_grads.instance_sum if with_sums else None
        for block in self.blocks(rows, kept):
            operands, instances = self.pairing.operands(rows, scale, block)
            own_columns = n, p, grad_n, own.p, *own_sums
            columns = columns_of(block, all_n, all_p, all_grads.n, all_grads.p, *all_sums)
            flags = self.negatives, self.positives
            operators.pair_stats_backward(
                *operands, *instances, *_NO_WEIGHTS, *own_columns, *columns, *flags, grad_x, None
            )
        return grad_x


def _differentiate(
    loss: RowLoss, n: Tensor, p: Tensor, g: Tensor, count: Tensor, instance_count: Tensor | None
) -> RowStatistics:
    """Returns dL/dstatistics of some anchors from the gradients g of their losses."""
    zeros = torch.zeros_like(n)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in (n, p, zeros, zeros.clone(), zeros.clone())]
        losses, _ = loss(RowStatistics(*leaves), count, instance_count)
        grads = torch.autograd.grad(losses, leaves, g.to(losses.dtype), allow_unused=True)
    return RowStatistics(*(zeros if grad is None else grad for grad in grads))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, plan: _GatheredPlan) -> Any:
        kept = plan.batch.communicator.keep(rows)
        statistics = plan.statistics(rows, scale, kept)
        ctx.plan = plan.with_tensors((None,) * 4)
        ctx.save_for_backward(rows, scale, kept, statistics.n, statistics.p, *plan.tensors)
        if plan.loss is None:
            return tuple(statistics)
        return (plan.loss(statistics, *plan.batch.own_counts)[0],)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, scale, kept, n, p, *tensors = ctx.saved_tensors
        plan = ctx.plan.with_tensors(tensors)
        grad_scale: Tensor | None = None
        result: tuple[Tensor | None, ...]
        with torch.no_grad():
            grad_x = plan.gradient(rows, scale, kept, n, p, grads)
            if ctx.needs_input_grad[1]:
                # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij over all i: every pair counts twice.
                grad_scale = row_products(rows, grad_x, scale.dtype) / (2 * scale)
            result = grad_x.to(rows.dtype) if ctx.needs_input_grad[0] else None, grad_scale
        if torch.is_grad_enabled():
            result = tuple(
                None if grad is None else RefuseSecond.apply(grad, rows, *grads) for grad in result
            )
        return *result, None


def _apply(problem: Problem, loss: RowLoss | None, requested: dict[str, Any]) -> tuple[Tensor, ...]:
    assert problem.global_batch is not None
    plan = _GatheredPlan(problem.backend, problem.global_batch, loss, **requested)
    result: tuple[Tensor, ...] = _Gathered.apply(problem.x, problem.scale, plan)
    return result


@torch.compiler.disable
def prepare_gathered(
    features: Tensor, labels: Any, mask: Any, given: dict[str, Any], loss: tuple[str, Mapping[str, Any]],
    temperature: float | Tensor, need_instances: bool,
) -> Problem:  # fmt: skip
    """The problem of a loss that gathers. A process that refuses its arguments tells the others.

    Args:
        features: as the caller gave them, like ``labels`` and ``mask``.
        labels: or None.
        mask: or None.
        given: the other options of the loss, as :func:`pysupcon.pairs.problem.prepare` takes them.
        loss: its name and the parameters that only this loss has.
        temperature: of the loss.
        need_instances: whether the loss needs to know the views of a sample.
    """
    check_gather(given["gather"])
    shared = SharedArguments(given["gather"], *loss, features, labels, mask, given)
    given = {**given, "gather": shared}
    try:
        return prepare(
            features, labels, mask, temperature=temperature, need_instances=need_instances, **given
        )  # fmt: skip
    except Exception:
        shared.refuse()
        raise


@torch.compiler.disable
def gathered_losses(
    problem: Problem, loss: RowLoss, requested: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the losses of the own anchors. Every process calls it, and the backward of its result.

    Args:
        problem: with a global batch.
        loss: from statistics to losses.
        requested: arguments of :meth:`Problem.statistics`: the statistics that ``loss`` needs.

    Returns:
        Losses [M]; bool [M], which anchors have a loss; and the number of anchors of all processes that have
        one, int64 of no dimensions.
    """
    batch = problem.global_batch
    assert batch is not None
    (losses,) = _apply(problem, loss, requested)
    placeholder = problem.scale.detach().new_zeros(()).expand(batch.count.shape)
    with torch.no_grad():
        _, all_valid = loss(RowStatistics(*[placeholder] * 5), batch.count, batch.instance_count)
    return losses, all_valid[batch.own_rows], all_valid.sum()


@torch.compiler.disable
def gathered_statistics(problem: Problem, requested: dict[str, Any]) -> RowStatistics:
    """Computes n, p and positive_sum of the own anchors against all rows, differentiable once."""
    return RowStatistics(*_apply(problem, None, requested))
