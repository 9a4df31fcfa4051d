"""The differentiable step of every loss when its candidates are the rows of several processes.

The own rows are anchors; the candidates are everybody's rows, which come in blocks: one block that holds
them all, or one block a process, passed around. What the blocks give an anchor's statistics is merged. In the
backward every process learns a few scalars of every other anchor, and with them computes the complete
gradient of its own rows, sum_j (G_ij + G_ji) x_j: no gradient of a row travels. Knows no process group
(:class:`pysupcon.pairs.problem.Gather` does).

What travels of an anchor in the backward: the upstream gradient g of its loss and, of n, p and dL/dn, what
the loss needs; the O(N) step from statistics to losses is differentiated again, for everybody's anchors, by
every process. In bytes: SupCon and InfoNCE (g, n, p) 24, cNCE (g, p) 16, SINCERE (g, n, dL/dn) 24, spread
(g, n, p) 24, with SINCERE as base (g, n, p, dL/dn) 32. They are float64, because the parts of a gradient that
come from them cancel as a loss converges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.autograd import RefuseSecond
from pysupcon.pairs.ops import zero_gradients
from pysupcon.pairs.problem import Block, Everybody, Problem, _rows_of, _sort
from pysupcon.pairs.statistics import OPERATORS, RowStatistics, row_products

__all__ = ["RowLoss", "gathered_losses", "gathered_statistics"]

RowLoss = Callable[[RowStatistics, Tensor, "Tensor | None"], "tuple[Tensor, Tensor]"]
"""(statistics, |P_i|, |A_i|) -> losses per anchor, and which anchors have one (by the counts alone). Linear
in the sums (positive_sum, instance_sum, softplus): their values do not travel."""


class _Pairing:
    """Who is whose positive, block by block. Every sort is done once a pass."""

    def __init__(self, everybody: Everybody) -> None:
        self.everybody = everybody
        self._sides: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def _side(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels, order and instances of the rows of samples ``start`` to ``stop``."""
        if (start, stop) not in self._sides:
            ids, views = self.everybody.ids[start:stop], self.everybody.views
            instances = self.everybody.instances
            if instances is not None:
                instances = instances[start:stop]  # ascending with the ids
            order = _sort(ids if instances is None else instances, views)[1]
            rows = None if instances is None else _rows_of(instances, views)
            self._sides[start, stop] = _rows_of(ids, views), order, rows
        return self._sides[start, stop]

    def operands(self, rows: Tensor, scale: Tensor, block: Block) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
        """The operators' first eight arguments, the own rows against a block; and both sides' instances."""
        start, stop = self.everybody.own
        *own, instances = self._side(start, stop)
        if block.rows is None:
            return (rows, *own, scale, None, None, None, None), (instances, None)
        count = rows.shape[0]
        if block.start <= start and stop <= block.stop:
            first = (start - block.start) * self.everybody.views
            self_index = torch.arange(first, first + count, device=rows.device)
        else:
            self_index = torch.full((count,), -1, dtype=torch.int64, device=rows.device)
        *others, other_instances = self._side(block.start, block.stop)
        return (rows, *own, scale, block.rows, *others, self_index), (instances, other_instances)


class _Plan:
    """What to compute. ``loss`` None: the statistics themselves are the result."""

    def __init__(
        self,
        backend: str,
        everybody: Everybody,
        loss: RowLoss | None,
        negatives: bool = False,
        positives: bool = False,
        epsilon: float | None = None,
    ) -> None:
        self.backend, self.ops = backend, OPERATORS[backend]
        self.everybody, self.loss = everybody, loss
        self.negatives, self.positives, self.epsilon = negatives, positives, epsilon
        self.pairing = _Pairing(everybody)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What autograd must keep for the backward besides rows and statistics: ids, counts, instances and
        their counts."""
        everybody = self.everybody
        return everybody.ids, everybody.count, everybody.instances, everybody.instance_count

    def with_tensors(self, tensors: Sequence[Any]) -> _Plan:
        """The same plan of other :attr:`tensors`, in their order."""
        ids, count, instances, instance_count = tensors
        everybody = replace(
            self.everybody, ids=ids, count=count, instances=instances, instance_count=instance_count
        )
        return _Plan(self.backend, everybody, self.loss, self.negatives, self.positives, self.epsilon)

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Iterator[Block]:
        """The blocks that hold rows. All are passed on, come what may: the others wait for them."""
        with closing(self.everybody.round.blocks(rows, kept)) as blocks:
            for block in blocks:
                if rows.shape[0] and block.stop > block.start:
                    yield block

    def statistics(self, rows: Tensor, scale: Tensor, kept: Tensor | None) -> RowStatistics:
        """Of the own anchors; what was not asked for is -inf (n, p) or 0."""
        n = p = scale.new_full((rows.shape[0],), -math.inf)
        positive_sum, instance_sum, softplus = (torch.zeros_like(n) for _ in range(3))
        for block in self.blocks(rows, kept):
            operands, instances = self.pairing.operands(rows, scale, block)
            more = self.ops.pair_stats(*operands, *instances, self.negatives, self.positives)
            n, p = torch.logaddexp(n, more[0]), torch.logaddexp(p, more[1])  # of -inf and -inf: -inf
            positive_sum, instance_sum = positive_sum + more[2], instance_sum + more[3]
        if self.epsilon is not None:
            for block in self.blocks(rows, kept):
                operands, _ = self.pairing.operands(rows, scale, block)
                softplus += self.ops.positive_softplus(*operands, n, self.epsilon)
        statistics = RowStatistics(n, p, positive_sum, instance_sum, softplus)
        return statistics if self.everybody.instances is not None else statistics.without_instances()

    def upstream(
        self, n: Tensor, p: Tensor, grads: tuple[Tensor, ...], wire: torch.dtype
    ) -> tuple[RowStatistics, RowStatistics, Tensor, Tensor]:
        """dL/dstatistics of the own anchors and of everybody's; everybody's n and p."""
        everybody = self.everybody

        def one_sum(grads: RowStatistics) -> RowStatistics:
            """Without instances every positive is of the anchor's."""
            return grads if everybody.instances is not None else grads.with_one_sum()

        sent = {"n": n} if self.negatives else {}
        sent |= {"p": p} if self.positives else {}
        if self.loss is None:
            own = one_sum(RowStatistics(*grads))
            sent |= {"grad_n": own.n, "grad_p": own.p, "grad_positive_sum": own.positive_sum}
        else:
            own = one_sum(_differentiate(self.loss, n, p, grads[0], *everybody.own_counts))
            sent["g"] = grads[0]
        columns = torch.stack([column.to(wire) for column in sent.values()])
        received = dict(zip(sent, everybody.round.exchange(columns), strict=True))
        zeros = columns.new_zeros(everybody.count.shape)
        empty = torch.full_like(zeros, -math.inf)
        all_n, all_p = received.get("n", empty), received.get("p", empty)
        if self.loss is None:
            others = RowStatistics(*(received.get("grad_" + name, zeros) for name in own._fields))
        else:
            counts = everybody.count, everybody.instance_count
            others = one_sum(_differentiate(self.loss, all_n, all_p, received["g"], *counts))
        return own, others, all_n, all_p

    def gradient(
        self,
        rows: Tensor,
        scale: Tensor,
        kept: Tensor | None,
        n: Tensor,
        p: Tensor,
        grads: tuple[Tensor, ...],
    ) -> Tensor:
        """The complete gradient of the own rows [M, D]."""
        ops, everybody = self.ops, self.everybody
        own, others, all_n, all_p = self.upstream(n, p, grads, scale.dtype)
        # Blocks are added up before the sum is rounded to 16 bits.
        grad_x = zero_gradients(rows)

        def of(block: Block, *columns: Tensor | None) -> list[Tensor | None]:
            """What belongs to a block's rows; the operators know the own rows' columns already."""
            start, stop = block.start * everybody.views, block.stop * everybody.views
            alone = block.rows is None
            return [None if alone or column is None else column[start:stop] for column in columns]

        grad_n = own.n
        if self.epsilon is not None:
            for block in self.blocks(rows, kept):
                operands, _ = self.pairing.operands(rows, scale, block)
                columns = of(block, all_n, others.softplus)
                grad_n = grad_n + ops.positive_softplus_backward(
                    *operands, n, self.epsilon, own.softplus, *columns, grad_x, None
                )
            # Only now does anybody know its own dL/dn.
            others = others._replace(n=everybody.round.exchange(grad_n.unsqueeze(0))[0])
        with_sums = self.positives and everybody.instances is not None
        own_sums = own.positive_sum, own.instance_sum if with_sums else None
        other_sums = others.positive_sum, others.instance_sum if with_sums else None
        for block in self.blocks(rows, kept):
            operands, instances = self.pairing.operands(rows, scale, block)
            columns = of(block, all_n, all_p, others.n, others.p, *other_sums)
            mine = n, p, grad_n, own.p, *own_sums
            kinds = self.negatives, self.positives
            ops.pair_stats_backward(*operands, *instances, *mine, *columns, *kinds, grad_x, None)
        return grad_x


def _differentiate(
    loss: RowLoss, n: Tensor, p: Tensor, g: Tensor, count: Tensor, instance_count: Tensor | None
) -> RowStatistics:
    """dL/dstatistics of any anchors, from the upstream gradients g of their losses."""
    zeros = torch.zeros_like(n)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in (n, p, zeros, zeros.clone(), zeros.clone())]
        losses, _ = loss(RowStatistics(*leaves), count, instance_count)
        grads = torch.autograd.grad(losses, leaves, g.to(losses.dtype), allow_unused=True)
    return RowStatistics(*(zeros if grad is None else grad for grad in grads))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, plan: _Plan) -> Any:
        kept = plan.everybody.round.keep(rows)
        statistics = plan.statistics(rows, scale, kept)
        ctx.plan = plan.with_tensors((None,) * 4)
        ctx.save_for_backward(rows, scale, kept, statistics.n, statistics.p, *plan.tensors)
        if plan.loss is None:
            return tuple(statistics)
        return (plan.loss(statistics, *plan.everybody.own_counts)[0],)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, scale, kept, n, p, *tensors = ctx.saved_tensors
        plan = ctx.plan.with_tensors(tensors)
        grad_scale: Tensor | None = None
        result: tuple[Tensor | None, ...]
        with torch.no_grad():
            grad_x = plan.gradient(rows, scale, kept, n, p, grads)
            if ctx.needs_input_grad[1]:
                # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij over everybody's i: every pair twice.
                grad_scale = row_products(rows, grad_x, scale.dtype) / (2 * scale)
            result = grad_x.to(rows.dtype) if ctx.needs_input_grad[0] else None, grad_scale
        if torch.is_grad_enabled():
            result = tuple(
                None if grad is None else RefuseSecond.apply(grad, rows, *grads) for grad in result
            )
        return *result, None


def _apply(problem: Problem, loss: RowLoss | None, asked: dict[str, Any]) -> tuple[Tensor, ...]:
    assert problem.everybody is not None
    plan = _Plan(problem.backend, problem.everybody, loss, **asked)
    result: tuple[Tensor, ...] = _Gathered.apply(problem.x, problem.scale, plan)
    return result


@torch.compiler.disable
def gathered_losses(problem: Problem, loss: RowLoss, asked: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the own anchors [M], which of them have one, and how many of everybody's anchors have one.

    ``asked``: as in :meth:`Problem.statistics`. Every process calls it; so with its backward.
    """
    everybody = problem.everybody
    assert everybody is not None
    (losses,) = _apply(problem, loss, asked)
    nothing = problem.scale.detach().new_zeros(()).expand(everybody.count.shape)
    with torch.no_grad():
        _, all_valid = loss(RowStatistics(*[nothing] * 5), everybody.count, everybody.instance_count)
    start, stop = (bound * everybody.views for bound in everybody.own)
    return losses, all_valid[start:stop], all_valid.sum()


@torch.compiler.disable
def gathered_statistics(problem: Problem, asked: dict[str, Any]) -> RowStatistics:
    """Statistics of the own anchors against everybody's rows: n, p and positive_sum, differentiable once."""
    return RowStatistics(*_apply(problem, None, asked))
