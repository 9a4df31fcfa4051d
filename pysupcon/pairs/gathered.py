"""The differentiable step of every loss if the candidates are the rows of several processes.

The anchors are the rows of this process. The candidates come in blocks: one block with all rows, or one block
per process, passed around a ring. The statistics of the blocks are merged. In the backward each process
receives a few scalars of every other anchor and computes with them the complete gradient of its own rows, so
no gradient of a row is communicated. With G_ij = dL/ds_ij:
    no candidates   dL/dx_i = scale sum_j (G_ij + G_ji) x_j, over blocks of rows
    candidates      dL/dx_i = scale sum_j G_ij c_j, over blocks of candidates; then
                    dL/dc_j = scale sum_i G_ij x_i, over blocks of anchors, if the candidates need a gradient
With ``contrast_mode="one"`` the anchors are the first views, and the candidates are all rows. The memory of
this process is one more block, and its rows get no gradient. Log weights and counts of all anchors, which
include the memories of their processes, are exchanged with the ids. This module
knows no process group; it uses the :class:`pysupcon.pairs.global_batch.Communicator` of the problem.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs.agreement import SharedArguments
from pysupcon.pairs.autograd import RefuseSecond
from pysupcon.pairs.block_pairing import BlockPairing
from pysupcon.pairs.checks import check_gather
from pysupcon.pairs.global_batch import AnchorCounts, Block, GlobalBatch, Samples
from pysupcon.pairs.ops import zero_gradients
from pysupcon.pairs.problem import Problem, prepare
from pysupcon.pairs.statistics import OPERATORS, Operands, RowStatistics, row_products

__all__ = ["RowLoss", "gathered_losses", "gathered_statistics", "prepare_gathered"]

RowLoss = Callable[[RowStatistics, AnchorCounts], "tuple[Tensor, Tensor]"]
"""(statistics, counts) -> losses per anchor, and a bool mask of the anchors that have one, which depends on
the counts only. The losses are linear in positive_sum, instance_sum and softplus, whose values are not
communicated."""


class _Anchors(NamedTuple):
    """Statistics of anchors and their upstream gradients, [M] each."""

    n: Tensor
    p: Tensor
    limit: Tensor
    """n as the softplus sums take it: without the shift of the log weights of positives"""
    grads: RowStatistics
    """dL/dstatistics"""

    def of(self, block: Block, views: int) -> _Anchors:
        """Selects the rows of a block."""
        start, stop = block.start * views, block.stop * views
        grads = RowStatistics(*(column[start:stop] for column in self.grads))
        return _Anchors(self.n[start:stop], self.p[start:stop], self.limit[start:stop], grads)

    @classmethod
    def without_loss(cls, scale: Tensor, count: int) -> _Anchors:
        """Returns ``count`` rows that are no anchors: nothing depends on their statistics."""
        empty, zeros = scale.new_full((count,), -math.inf), scale.new_zeros((count,))
        return cls(empty, empty, empty, RowStatistics(*[zeros] * 5))


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
        self.pairing = BlockPairing(batch, negatives)
        self.with_instances = batch.anchors.instances is not None
        self.others = batch.anchors if batch.candidates is None else batch.candidates

    def with_tensors(self, tensors: Sequence[Any]) -> _GatheredPlan:
        """Returns the plan with other tensors of its batch, in the same order."""
        batch = self.batch.with_tensors(tensors)
        return _GatheredPlan(self.backend, batch, self.loss, self.negatives, self.positives, self.epsilon)

    def blocks(self, side: Samples, rows: Tensor, kept: Tensor | None, wanted: bool) -> Iterator[Block]:
        """Yields the blocks of one side that hold rows, if they are ``wanted``. Closing passes on all
        remaining blocks, also after an error, because the other processes wait for them."""
        separate = self.batch.candidates is not None
        with closing(side.communicator.blocks(rows, kept)) as blocks:
            for block in blocks:
                if wanted and block.stop > block.start:
                    yield block._replace(rows=rows) if separate and block.rows is None else block

    def statistics(
        self, x: Tensor, others: Tensor, scale: Tensor, outside: Tensor | None, kept: Tensor | None
    ) -> RowStatistics:
        """Computes the statistics of the own anchors; those not requested are -inf (n, p) or 0.

        Args:
            x: own anchors.
            others: own candidates; ``x`` if the anchors are the candidates.
            scale: 1 / temperature.
            outside: logsumexp of the own negatives of each anchor [M]; None: there are none.
            kept: what the communicator of the candidates keeps.
        """
        anchors, wanted = self.batch.anchors, x.shape[0] > 0
        n = p = scale.new_full((x.shape[0],), -math.inf)
        positive_sum, instance_sum, softplus = (torch.zeros_like(n) for _ in range(3))

        def add(operands: Operands) -> None:
            nonlocal n, p, positive_sum, instance_sum
            part = self.operators.pair_stats(*operands.of_statistics, operands.negatives, self.positives)
            n, p = torch.logaddexp(n, part[0]), torch.logaddexp(p, part[1])  # -inf if both are -inf
            positive_sum, instance_sum = positive_sum + part[2], instance_sum + part[3]

        for block in self.blocks(self.others, others, kept, wanted):
            add(self.pairing.of_block(anchors, self.others, x, scale, block, with_others=False))
        for operands in self.pairing.of_memory(x, scale):
            add(operands)
        if outside is not None and self.negatives:
            n = torch.logaddexp(n, outside)
        shift = self.batch.own_positive_shift
        if self.epsilon is not None:
            limit = (n if shift is None else n - shift), self.epsilon
            for block in self.blocks(self.others, others, kept, wanted):
                operands = self.pairing.of_block(anchors, self.others, x, scale, block, with_others=False)
                softplus += self.operators.positive_softplus(*operands.of_softplus, *limit)
            for operands in self.pairing.of_memory(x, scale):
                softplus += self.operators.positive_softplus(*operands.of_softplus, *limit)
            if shift is not None:
                softplus += self.batch.own_counts.positives * shift
        statistics = RowStatistics(n, p, positive_sum, instance_sum, softplus)
        return statistics if self.with_instances else statistics.without_instances()

    def upstream(self, n: Tensor, p: Tensor, grads: tuple[Tensor, ...]) -> _Anchors:
        """Returns the own anchors.

        Args:
            n: of the own anchors, like ``p``.
            grads: dL/dlosses, or dL/dstatistics if the plan has no loss.
        """
        if self.loss is None:
            own = RowStatistics(*grads)
        else:
            own = _differentiate(self.loss, n, p, grads[0], self.batch.own_counts)
        shift = self.batch.own_positive_shift
        limit = n if shift is None else n - shift
        return _Anchors(n, p, limit, own if self.with_instances else own.with_one_sum())

    def exchange(self, own: _Anchors, grads: tuple[Tensor, ...], dtype: torch.dtype) -> _Anchors:
        """Exchanges the scalars of the anchors, and returns the anchors of all processes.

        Args:
            own: own anchors.
            grads: as in :meth:`upstream`.
            dtype: of the communicated scalars.
        """
        batch = self.batch
        sent = {"n": own.n} if self.negatives else {}
        sent |= {"p": own.p} if self.positives else {}
        if self.loss is None:
            named = own.grads
            sent |= {"grad_n": named.n, "grad_p": named.p, "grad_positive_sum": named.positive_sum}
        else:
            sent["g"] = grads[0]
        columns = torch.stack([column.to(dtype) for column in sent.values()])
        received = dict(zip(sent, batch.anchors.communicator.exchange(columns), strict=True))
        zeros = columns.new_zeros(batch.counts.positives.shape)
        empty = torch.full_like(zeros, -math.inf)
        n, p = received.get("n", empty), received.get("p", empty)
        if self.loss is None:
            found = RowStatistics(*(received.get("grad_" + name, zeros) for name in named._fields))
        else:
            found = _differentiate(self.loss, n, p, received["g"], batch.counts)
            found = found if self.with_instances else found.with_one_sum()
        return _Anchors(n, p, n if batch.positive_shift is None else n - batch.positive_shift, found)

    def softplus_backward(
        self, operands: Operands, own: _Anchors, others: _Anchors | None, grad: Tensor
    ) -> Tensor:
        """Adds the gradient of the softplus sums to ``grad``; returns dL/dn of the own rows.

        Args:
            operands: own rows and a block.
            own: own rows as anchors.
            others: rows of the block as anchors; None: they are not, or they are the own rows.
            grad: of the own rows.
        """
        columns = (None, None) if others is None else (others.limit, others.grads.softplus)
        through: Tensor = self.operators.positive_softplus_backward(
            *operands.of_softplus, own.limit, self.epsilon, own.grads.softplus, *columns,
            grad, None,
        )  # fmt: skip
        return through

    def stats_backward(
        self, operands: Operands, own: _Anchors, others: _Anchors | None, grad: Tensor
    ) -> None:
        """Adds the gradient of the other statistics to ``grad``; arguments as in
        :meth:`softplus_backward`."""
        if not (operands.negatives or self.positives):
            return
        with_sums = self.positives and self.with_instances

        def columns(side: _Anchors) -> tuple[Tensor | None, ...]:
            _, _, positive_sum, instance_sum, _ = side.grads
            return (
                side.n, side.p, side.grads.n, side.grads.p, positive_sum, instance_sum if with_sums else None,
            )  # fmt: skip

        columns_of_others = (None,) * 6 if others is None else columns(others)
        self.operators.pair_stats_backward(
            *operands.of_statistics, *columns(own), *columns_of_others, operands.negatives,
            self.positives, grad, None,
        )  # fmt: skip

    def gradients(
        self,
        x: Tensor,
        candidates: Tensor | None,
        scale: Tensor,
        kept: Tensor | None,
        own: _Anchors,
        grads: tuple[Tensor, ...],
        candidate_gradient: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Computes the complete gradients of the own rows.

        Args:
            x: own anchors [M, D].
            candidates: own candidates [Mc, D]; None: the anchors.
            scale: 1 / temperature.
            kept: what the communicator of the candidates keeps.
            own: own anchors.
            grads: as in :meth:`upstream`.
            candidate_gradient: whether the candidates need a gradient, the same on all processes.

        Returns:
            Gradients of ``x`` from the batch, of ``x`` from the memory, and of ``candidates``, not rounded to
            16 bits yet; dL/dn of the own anchors.
        """
        anchors, others = self.batch.anchors, self.others
        rows = x if candidates is None else candidates
        of_memory = self.pairing.of_memory(x, scale)
        symmetric, wanted = candidates is None, x.shape[0] > 0
        everyone = self.exchange(own, grads, scale.dtype) if symmetric or candidate_gradient else None

        def as_anchors(block: Block) -> _Anchors | None:
            """The rows of a block of candidates as anchors."""
            if not symmetric or block.rows is None or everyone is None:
                return None
            return everyone.of(block, anchors.views)

        grad_x = zero_gradients(x)
        grad_memory = zero_gradients(x) if of_memory else None
        if self.epsilon is not None:
            grad_n = own.grads.n
            for block in self.blocks(others, rows, kept, wanted):
                also = as_anchors(block)
                operands = self.pairing.of_block(anchors, others, x, scale, block, also is not None)
                grad_n = grad_n + self.softplus_backward(operands, own, also, grad_x)
            for operands in of_memory:
                assert grad_memory is not None
                grad_n = grad_n + self.softplus_backward(operands, own, None, grad_memory)
            own = own._replace(grads=own.grads._replace(n=grad_n))
            if everyone is not None:  # dL/dn is complete only after all blocks
                all_n = anchors.communicator.exchange(grad_n.unsqueeze(0))[0]
                everyone = everyone._replace(grads=everyone.grads._replace(n=all_n))
        for block in self.blocks(others, rows, kept, wanted):
            also = as_anchors(block)
            operands = self.pairing.of_block(anchors, others, x, scale, block, also is not None)
            self.stats_backward(operands, own, also, grad_x)
        for operands in of_memory:
            assert grad_memory is not None
            self.stats_backward(operands, own, None, grad_memory)
        if candidates is None or everyone is None:
            return grad_x, grad_memory, None, own.grads.n

        # The own candidates are no anchors; the rows of the blocks are.
        grad_candidates = zero_gradients(candidates)
        no_anchors = _Anchors.without_loss(scale, candidates.shape[0])
        kept, wanted = anchors.communicator.keep(x), candidates.shape[0] > 0
        for block in self.blocks(anchors, x, kept, wanted):
            operands = self.pairing.of_block(others, anchors, candidates, scale, block, with_others=True)
            block_anchors = everyone.of(block, anchors.views)
            if self.epsilon is not None:
                self.softplus_backward(operands, no_anchors, block_anchors, grad_candidates)
            self.stats_backward(operands, no_anchors, block_anchors, grad_candidates)
        return grad_x, grad_memory, grad_candidates, own.grads.n


def _differentiate(loss: RowLoss, n: Tensor, p: Tensor, g: Tensor, counts: AnchorCounts) -> RowStatistics:
    """Returns dL/dstatistics of some anchors from the gradients g of their losses."""
    zeros = torch.zeros_like(n)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in (n, p, zeros, zeros.clone(), zeros.clone())]
        losses, _ = loss(RowStatistics(*leaves), counts)
        grads = torch.autograd.grad(losses, leaves, g.to(losses.dtype), allow_unused=True)
    return RowStatistics(*(zeros if grad is None else grad for grad in grads))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, candidates: Tensor | None, scale: Tensor, outside: Tensor | None,
        plan: _GatheredPlan,
    ) -> Any:  # fmt: skip
        others = x if candidates is None else candidates
        kept = plan.others.communicator.keep(others)
        statistics = plan.statistics(x, others, scale, outside, kept)
        tensors = plan.batch.tensors
        ctx.plan = plan.with_tensors((None,) * len(tensors))
        ctx.save_for_backward(x, candidates, scale, outside, kept, statistics.n, statistics.p, *tensors)
        if plan.loss is None:
            return tuple(statistics)
        return (plan.loss(statistics, plan.batch.own_counts)[0],)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, candidates, scale, outside, kept, n, p, *tensors = ctx.saved_tensors
        plan, needs = ctx.plan.with_tensors(tensors), ctx.needs_input_grad
        grad_scale = grad_outside = None
        result: tuple[Tensor | None, ...]
        with torch.no_grad():
            own = plan.upstream(n, p, grads)
            grad_x, grad_memory, grad_candidates, grad_n = plan.gradients(
                x, candidates, scale, kept, own, grads, needs[1]
            )
            if needs[2]:
                # sum_i x_i . dL/dx_i = sum_ij (G_ij + G_ji) s_ij over all i: without separate candidates
                # every pair counts twice.
                twice = 2 if candidates is None else 1
                grad_scale = row_products(x, grad_x, scale.dtype) / (twice * scale)
                if grad_memory is not None:
                    grad_scale += row_products(x, grad_memory, scale.dtype) / scale
            if grad_memory is not None:
                grad_x += grad_memory
            if outside is not None:
                share = torch.where(outside == -math.inf, 0.0, (outside - n).exp())
                grad_outside = share * grad_n if plan.negatives else torch.zeros_like(outside)
            if grad_candidates is not None:
                grad_candidates = grad_candidates.to(candidates.dtype)
            result = grad_x.to(x.dtype) if needs[0] else None, grad_candidates, grad_scale, grad_outside
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in (x, candidates, outside, *grads) if tensor is not None]
            result = tuple(None if grad is None else RefuseSecond.apply(grad, *inputs) for grad in result)
        return *result, None


def _apply(problem: Problem, loss: RowLoss | None, requested: dict[str, Any]) -> tuple[Tensor, ...]:
    assert problem.global_batch is not None
    plan = _GatheredPlan(problem.backend, problem.global_batch, loss, **requested)
    outside = problem.hard_negative_logsumexp() if plan.negatives else None
    result: tuple[Tensor, ...] = _Gathered.apply(problem.x, problem.candidates, problem.scale, outside, plan)
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the losses of the own anchors. Every process calls it, and the backward of its result.

    Args:
        problem: with a global batch.
        loss: from statistics to losses.
        requested: arguments of :meth:`Problem.statistics`: the statistics that ``loss`` needs.

    Returns:
        Losses [M]; the number of anchors of all processes that have one, int64 of no dimensions; and the sum
        of their weights, None without anchor_weights.
    """
    batch = problem.global_batch
    assert batch is not None
    (losses,) = _apply(problem, loss, requested)
    placeholder = problem.scale.detach().new_zeros(()).expand(batch.counts.positives.shape)
    with torch.no_grad():
        _, valid = loss(RowStatistics(*[placeholder] * 5), batch.counts)
        weights = problem.all_anchor_weights
        total = None if weights is None else torch.where(valid, weights, 0.0).sum()
    return losses, valid.sum(), total


@torch.compiler.disable
def gathered_statistics(problem: Problem, requested: dict[str, Any]) -> RowStatistics:
    """Computes n, p and positive_sum of the own anchors against all rows, differentiable once."""
    n, p, *sums = _apply(problem, None, requested)
    batch = problem.global_batch
    if batch is not None and batch.own_positive_shift is not None:
        p = p + batch.own_positive_shift
    return RowStatistics(n, p, *sums)
