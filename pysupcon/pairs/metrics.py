"""Metrics of the embeddings: top-1 accuracy, and mean similarities of positives and of negatives.

The accuracy visits all pairs tile by tile, in O(N) memory. The means come from sums of rows, in O(N D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysupcon.pairs import ops
from pysupcon.pairs.problem import Problem
from pysupcon.pairs.statistics import Pairing
from pysupcon.pairs.tiled import check_finite
from pysupcon.pairs.tiles import Pairs, PositiveMask, Slice, Tile, and_not, negated, no_autocast, slices

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
    x, candidates = problem.x.detach(), problem.candidates
    candidates = None if candidates is None else candidates.detach()
    with no_autocast(x), torch.no_grad():
        scale = torch.ones((), dtype=ops.stats_dtype(x), device=x.device)
        zero_or_nan = check_finite(x, candidates, scale)
        valid = problem.count > 0
        correct = _nearest_is_positive(x, candidates, scale, problem.pairing, problem.mask) & valid
        positive_sum, negative_sum = _similarity_sums(x, candidates, problem.pairing, problem.mask)
        if candidates is None:
            others = x.shape[0] - 1
        else:
            others = candidates.shape[0] - int(problem.pairing.self_index is not None)
        negative_count = torch.where(valid, others - problem.count, 0)
        found = (
            correct.sum().to(scale) / valid.sum(),
            torch.where(valid, positive_sum, 0.0).sum() / problem.count.sum(),
            torch.where(valid, negative_sum, 0.0).sum() / negative_count.sum(),
        )
        accuracy, positive, negative = ((value + zero_or_nan).to(problem.loss_dtype) for value in found)
    return accuracy, positive, negative


def _nearest_is_positive(
    x: Tensor, candidates: Tensor | None, scale: Tensor, pairing: Pairing, mask: PositiveMask | None
) -> Tensor:
    """Whether a positive of each anchor is more similar than all of its negatives, bool [M]."""
    pairs = Pairs(
        x, pairing.labels, pairing.order, scale, candidates, pairing.candidate_labels,
        pairing.candidate_order, pairing.self_index, mask,
    )  # fmt: skip
    rows = pairs.anchors.rows
    positive, negative = (rows.new_full(rows.shape[:1], -math.inf) for _ in range(2))
    for tile in pairs.tiles():
        _raise_to(positive, negative, tile, tile.i, tile.same, 1)
        if pairs.symmetric and not tile.diagonal:
            _raise_to(positive, negative, tile, tile.j, tile.same_back, 0)
    return torch.empty_like(positive, dtype=torch.bool).index_copy(0, pairing.order, positive > negative)


def _raise_to(
    positive: Tensor, negative: Tensor, tile: Tile, at: Slice, same: Tensor | bool, dim: int
) -> None:
    """Raises the largest similarities of the rows ``at`` to those of a tile."""
    for largest, relation in ((positive, same), (negative, negated(same))):
        keep = and_not(relation, tile.left_out)
        if keep is False:
            continue
        s = tile.similarity if isinstance(keep, bool) else tile.similarity.masked_fill(~keep, -math.inf)
        part = largest[slice(*at)]
        torch.maximum(part, s.amax(dim), out=part)


def _similarity_sums(
    x: Tensor, candidates: Tensor | None, pairing: Pairing, mask: PositiveMask | None
) -> tuple[Tensor, Tensor]:
    """Sums of x_i . c_j over P_i and over N_i, [M] in the dtype of the statistics.

    The sum over a set is x_i . (sum of its rows). It must not contain the anchor itself.
    """
    rows = x if candidates is None else candidates
    own_is_positive: Tensor | None = None
    if mask is None:
        order = pairing.order if pairing.candidate_order is None else pairing.candidate_order
        labels = pairing.labels if pairing.candidate_labels is None else pairing.candidate_labels
        labels = labels.index_select(0, order)
        first = torch.searchsorted(labels, labels)  # the class of a row: where it starts in label order
        sums = _sums_of_rows(rows.index_select(0, order), first, rows.shape[0] + 1)
        index = torch.searchsorted(labels, pairing.labels)
    else:
        samples = _sums_of_rows(rows, mask.columns, mask.mask.shape[1])
        parts = [mask.mask[a:b].to(samples.dtype) @ samples for a, b in slices(mask.mask.shape[0], _ROWS)]
        sums, index = torch.cat([*parts, samples[:0]]), mask.rows
        if candidates is None:
            own_is_positive = mask.mask[mask.rows, mask.columns]
        elif pairing.self_index is not None:
            own_is_positive = mask.mask[mask.rows, mask.columns[pairing.self_index]]
    total = _sums_of_rows(rows, torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device), 1)[0]
    positive, every, own = (total.new_zeros(x.shape[0]) for _ in range(3))
    for a, b in slices(x.shape[0], _ROWS):
        anchors = x[a:b].to(total.dtype)
        positive[a:b] = (anchors * sums.index_select(0, index[a:b])).sum(1)
        every[a:b] = anchors @ total
        own[a:b] = anchors.square().sum(1)
    if candidates is not None and pairing.self_index is None:
        return positive, every - positive
    positive -= own if own_is_positive is None else torch.where(own_is_positive, own, 0.0)
    return positive, every - own - positive


def _sums_of_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the rows of each index, [count, D] in the dtype of the statistics."""
    sums = torch.zeros(count, rows.shape[1], dtype=ops.stats_dtype(rows), device=rows.device)
    for a, b in slices(rows.shape[0], _ROWS):
        sums.index_add_(0, index[a:b], rows[a:b].to(sums.dtype))
    return sums
