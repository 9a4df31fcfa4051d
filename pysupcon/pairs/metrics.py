"""Metrics of the embeddings: top-1 accuracy, and mean similarities of positives and of negatives.

The accuracy visits all pairs tile by tile, in O(N) memory. The means come from sums of rows, in O(N D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysupcon.pairs import ops
from pysupcon.pairs.problem import Problem
from pysupcon.pairs.slicing import Slice, slices
from pysupcon.pairs.statistics import Operands, Pairing, Plan
from pysupcon.pairs.tiled import check_finite
from pysupcon.pairs.tiles import (  # fmt: skip
    Pairs,
    Tile,
    and_not,
    negated,
    no_autocast,
    zero_unless,
)

__all__ = ["similarity_metrics"]

_ROWS = 4096  # rows in float64 at a time


def similarity_metrics(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 accuracy, and the mean similarity of positive and of negative pairs.

    Args:
        problem: with a temperature of 1. Only anchors that have a positive are considered.

    Returns:
        Three scalars without gradient, of the dtype of the losses; NaN for a mean over nothing.

    Raises:
        ValueError: on a CPU; features are not finite.
    """
    x, count = problem.x.detach(), problem.count
    candidates = None if problem.candidates is None else problem.candidates.detach()
    plan = Plan(
        problem.backend, problem.pairing, problem.mask, memory=problem.memory,
        batch_negatives=problem.batch_negatives,
    )  # fmt: skip
    with no_autocast(x), torch.no_grad():
        scale = torch.ones((), dtype=ops.stats_dtype(x), device=x.device)
        nearest = _Nearest(x)
        positive_sum, negative_sum = (scale.new_zeros(x.shape[0]) for _ in range(2))
        zero_or_nan = torch.zeros_like(scale)
        for block in plan.blocks(x, candidates, scale):
            zero_or_nan = zero_or_nan + check_finite(x, block.rows[4], scale)
            positive = nearest.add(block)
            positive_sum += positive
            if block.negatives:
                negative_sum += _sum_over_all(block) - positive
        own = problem.hard_negative_similarity()
        if own is not None:
            nearest.add_negatives(own)
            negative_sum += own.to(scale.dtype).sum(1)
        valid = count > 0
        negative_count = torch.where(valid, problem.candidate_count - count, 0)
        found = (
            (nearest.is_positive & valid).sum().to(scale) / valid.sum(),
            torch.where(valid, positive_sum, 0.0).sum() / count.sum(),
            torch.where(valid, negative_sum, 0.0).sum() / negative_count.sum(),
        )
        accuracy, positive, negative = ((value + zero_or_nan).to(problem.loss_dtype) for value in found)
    return accuracy, positive, negative


def _excluded(pairing: Pairing, symmetric: bool) -> Tensor | None:
    """Which rows are no candidates, bool [N]; None: all are."""
    log_weights = pairing.log_weights if symmetric else pairing.candidate_log_weights
    return None if log_weights is None else log_weights == -math.inf


class _Nearest:
    """The largest similarity of each anchor to its positives and to its negatives, [M]."""

    def __init__(self, x: Tensor) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.positive, self.negative = (x.new_full(x.shape[:1], -math.inf, dtype=dtype) for _ in range(2))

    @property
    def is_positive(self) -> Tensor:
        return self.positive > self.negative

    def add(self, block: Operands) -> Tensor:
        """Adds the candidates of a block. Returns the sum of the similarities to its positives, [M]."""
        x, labels, order, scale, candidates, other_labels, other_order, self_index = block.rows
        mask = block.mask_arguments.get("mask")
        pairs = Pairs(x, labels, order, scale, candidates, other_labels, other_order, self_index, mask)
        excluded = _excluded(block.pairing, pairs.symmetric)
        if excluded is not None:
            excluded = excluded.index_select(0, pairs.candidates.order)
        positive, negative = (torch.full_like(self.positive, -math.inf) for _ in range(2))
        total = torch.zeros(positive.shape, dtype=scale.dtype, device=x.device)
        for tile in pairs.tiles(only_positives=not block.negatives):
            sides = [(tile.i, tile.j, tile.same, 1)]
            if pairs.symmetric and not tile.diagonal:
                sides.append((tile.j, tile.i, tile.same_back, 0))
            for at, columns, same, dim in sides:
                _raise_to(positive, tile, at, same, None, dim)
                if mask is not None:
                    keep = and_not(same, tile.left_out)
                    total[slice(*at)] += zero_unless(tile.similarity, keep).sum(dim, dtype=total.dtype)
                if block.negatives:
                    out = None if excluded is None else excluded[slice(*columns)].unsqueeze(1 - dim)
                    _raise_to(negative, tile, at, negated(same), out, dim)
        # The values are in label order.
        self.positive = torch.maximum(
            self.positive, torch.empty_like(positive).index_copy(0, order, positive)
        )
        self.negative = torch.maximum(
            self.negative, torch.empty_like(negative).index_copy(0, order, negative)
        )
        return _sum_over_class(block) if mask is None else torch.empty_like(total).index_copy(0, order, total)

    def add_negatives(self, similarity: Tensor) -> None:
        """Adds negatives of each anchor [M, K]."""
        if similarity.shape[1]:
            self.negative = torch.maximum(self.negative, similarity.amax(1).to(self.negative.dtype))


def _raise_to(
    largest: Tensor, tile: Tile, at: Slice, relation: Tensor | bool, excluded: Tensor | None, dim: int
) -> None:
    """Raises the largest similarities of the rows ``at`` to those of a tile whose relation is true."""
    keep = and_not(and_not(relation, tile.left_out), excluded)
    if keep is False:
        return
    s = tile.similarity if isinstance(keep, bool) else tile.similarity.masked_fill(~keep, -math.inf)
    part = largest[slice(*at)]
    torch.maximum(part, s.amax(dim), out=part)


def _sum_over_class(block: Operands) -> Tensor:
    """x_i . c_j, summed over the candidates of the anchor's label without the anchor itself, [M].

    It is x_i . (sum of the rows of the label).
    """
    x, labels, order, _, candidates, other_labels, other_order, self_index = block.rows
    rows = x if candidates is None else candidates
    order = order if candidates is None else other_order
    ascending = (labels if candidates is None else other_labels).index_select(0, order)
    first = torch.searchsorted(ascending, ascending)  # the class of a row: where it starts in label order
    sums = _sums_of_rows(rows.index_select(0, order), first, rows.shape[0] + 1)
    index = torch.searchsorted(ascending, labels)
    absent = torch.searchsorted(ascending, labels, right=True) == index
    index = index.masked_fill(absent, rows.shape[0])  # the last sum is 0
    return _products(x, sums, index, candidates is None or self_index is not None)


def _sum_over_all(block: Operands) -> Tensor:
    """x_i . c_j, summed over all candidates without the anchor itself, [M]."""
    x, _, _, _, candidates, _, _, self_index = block.rows
    rows = x if candidates is None else candidates
    excluded = _excluded(block.pairing, candidates is None)
    part = torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device)
    sums = _sums_of_rows(rows, part if excluded is None else excluded.to(torch.int64), 2)
    index = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return _products(x, sums, index, candidates is None or self_index is not None)


def _products(x: Tensor, sums: Tensor, index: Tensor, without_own: bool) -> Tensor:
    """x_i . sums[index_i], without the part x_i . x_i if ``without_own``."""
    products = sums.new_empty(x.shape[0])
    for a, b in slices(x.shape[0], _ROWS):
        anchors = x[a:b].to(sums.dtype)
        others = sums.index_select(0, index[a:b])
        products[a:b] = (anchors * (others - anchors if without_own else others)).sum(1)
    return products


def _sums_of_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the rows of each index, [count, D] in the dtype of the statistics."""
    sums = torch.zeros(count, rows.shape[1], dtype=ops.stats_dtype(rows), device=rows.device)
    for a, b in slices(rows.shape[0], _ROWS):
        sums.index_add_(0, index[a:b], rows[a:b].to(sums.dtype))
    return sums
