"""Which rows are positives of which anchor: index arguments for the operators, and counts per anchor.

The input is ids per sample (labels, instances) or a mask; the output is a
:class:`pysupcon.pairs.statistics.Pairing` per row. Each set of ids is sorted once per call of a loss. Nothing
here waits for a GPU.

Shapes: B samples with V views each are M = B * V rows; view v of sample b is row b * V + v. ``ids`` are int64
[B] unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import custom_op, modes, ops, tiled
from pysupcon.pairs.many_labels import LEVELS, ManyLabels, overlap_totals
from pysupcon.pairs.positive_means import PositiveWeights
from pysupcon.pairs.statistics import Pairing

__all__ = [
    "InstanceIds",
    "add_instances",
    "count_matches",
    "number_pairs",
    "order_and_count",
    "pair_apart",
    "pair_by_id",
    "pair_by_mask",
    "pair_by_overlap",
    "repeat_per_view",
    "sort_rows",
    "unused_id",
    "weigh_positives",
]


def repeat_per_view(ids: Tensor, views: int) -> Tensor:
    """Repeats one value per sample [B] for each of its rows [B * V]."""
    return ids if views == 1 else ids.unsqueeze(1).expand(-1, views).reshape(-1).contiguous()


def sort_rows(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Returns the sorted ids [B] and the stable argsort of the rows [B * V]."""
    sorted_ids, order = torch.sort(ids, stable=True)
    if views > 1:
        order = (order.unsqueeze(1) * views + torch.arange(views, device=ids.device)).reshape(-1)
    return sorted_ids, order


def count_matches(sorted_ids: Tensor, ids: Tensor, views: int = 1) -> Tensor:
    """Counts for each id the rows that have it.

    Args:
        sorted_ids: ids of the samples to search, ascending.
        ids: ids to look up, int64 of any shape.
        views: rows per sample of ``sorted_ids``.

    Returns:
        int64 of the shape of ``ids``.
    """
    rows = torch.searchsorted(sorted_ids, ids, right=True).sub_(torch.searchsorted(sorted_ids, ids))
    return rows if views == 1 else rows.mul_(views)


def order_and_count(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Returns the stable argsort of the rows and, per row, the number of other rows with the same id."""
    # vmap has no rule for the compiled operator.
    supported = torch.compiler.is_compiling() or not modes.is_transformed()
    if ids.device.type == "cpu" and ops.compiled_for("cpu") and supported:
        order, count = ops.order_by_class(ids, views)
        return order, count
    sorted_ids, order = sort_rows(ids, views)
    return order, repeat_per_view(count_matches(sorted_ids, ids, views).sub_(1), views)


def pair_by_id(
    ids: Tensor,
    views: int,
    candidate_ids: Tensor | None,
    candidate_views: int,
    self_index: Tensor | None,
) -> tuple[Pairing, Tensor]:
    """Takes rows of the same id as positives.

    Args:
        ids: of the anchors' samples.
        views: rows per sample of the anchors.
        candidate_ids: of the candidates' samples; None: the anchors are the candidates.
        candidate_views: rows per sample of the candidates.
        self_index: int64 [M], the candidate row that is the anchor itself; None: no anchor is a candidate.

    Returns:
        The pairing, and |P_i| per anchor, int64 [M].
    """
    labels = repeat_per_view(ids, views)
    if candidate_ids is None:
        order, count = order_and_count(ids, views)
        return Pairing(labels, order), count
    order = sort_rows(ids, views)[1]
    sorted_candidates, candidate_order = sort_rows(candidate_ids, candidate_views)
    count = repeat_per_view(count_matches(sorted_candidates, ids, candidate_views), views)
    if self_index is not None:
        count = count - 1
    candidate_labels = repeat_per_view(candidate_ids, candidate_views)
    return Pairing(labels, order, candidate_labels, candidate_order, self_index), count


def pair_by_mask(
    mask: Tensor, views: int, candidate_views: int, self_index: Tensor | None, rectangular: bool
) -> tuple[Pairing, Tensor, tiled.PositiveMask]:
    """Takes row j as a positive of row i where the mask of their samples is true.

    Args:
        mask: bool [samples of the anchors, samples of the candidates].
        views: rows per sample of the anchors.
        candidate_views: rows per sample of the candidates.
        self_index: as in :func:`pair_by_id`.
        rectangular: whether the candidates are not the anchors themselves.

    Returns:
        The pairing, |P_i| per anchor, int64 [M], and the mask for the tiled operators.
    """
    rows = repeat_per_view(torch.arange(mask.shape[0], device=mask.device), views)
    columns = repeat_per_view(torch.arange(mask.shape[1], device=mask.device), candidate_views)
    positives = tiled.PositiveMask(mask, rows, columns)
    if modes.is_eager(mask):
        count = tiled.positive_count(positives, self_index, symmetric=not rectangular)
    else:
        count = custom_op.positive_count(mask, rows, columns, self_index, not rectangular)
    order, candidate_order = (torch.arange(side.shape[0], device=mask.device) for side in (rows, columns))
    if not rectangular:
        return Pairing(rows, order), count, positives
    return Pairing(rows, order, columns, candidate_order, self_index), count, positives


def _count_overlaps(
    labels: ManyLabels, views: int, candidate_views: int, self_index: Tensor | None
) -> Tensor:
    """Sums over the candidate rows of each anchor: overlaps, or 1 for "any"; [M], without the anchor."""
    count = overlap_totals if modes.is_eager(labels.own) else custom_op.overlap_totals
    totals = count(labels.own, labels.candidates, labels.threshold, labels.weighted) * candidate_views
    if labels.candidates is None or self_index is not None:
        totals = totals - labels.own.any(dim=1).to(totals)  # the overlap of a row with itself is 1
    return repeat_per_view(totals, views)


def pair_by_overlap(
    labels: ManyLabels, views: int, candidate_views: int, self_index: Tensor | None, rectangular: bool
) -> tuple[Pairing, Tensor, tiled.PositiveMask]:
    """Takes rows whose labels overlap as positives; arguments and results as in :func:`pair_by_mask`."""
    samples = torch.arange(labels.own.shape[0], device=labels.own.device)
    rows, columns, stacked = repeat_per_view(samples, views), samples, labels.own
    if labels.candidates is not None:
        columns = torch.arange(labels.candidates.shape[0], device=samples.device) + samples.shape[0]
        stacked = torch.cat([labels.own, labels.candidates])
    columns = repeat_per_view(columns, candidate_views)
    count = _count_overlaps(labels, views, candidate_views, self_index).to(torch.int64)
    order, candidate_order = (torch.arange(side.shape[0], device=rows.device) for side in (rows, columns))
    positives = tiled.PositiveMask(stacked, rows, columns, labels.threshold)
    if not rectangular:
        return Pairing(rows, order), count, positives
    return Pairing(rows, order, columns, candidate_order, self_index), count, positives


def pair_apart(anchors: int, candidates: int | None, self_index: Tensor | None, like: Tensor) -> Pairing:
    """Returns the pairing in which every other row is a negative.

    Args:
        anchors: number of anchors M.
        candidates: number of candidates N; None: the candidates are the anchors.
        self_index: as in :func:`pair_by_id`.
        like: a tensor on the device of the rows.
    """
    rows = torch.arange(anchors, device=like.device)
    if candidates is None:
        return Pairing(rows, rows)
    columns = torch.arange(candidates, device=like.device)
    labels = rows + candidates if self_index is None else self_index
    return Pairing(labels, rows, columns, columns, self_index)


def weigh_positives(
    labels: ManyLabels, views: int, candidate_views: int, self_index: Tensor | None
) -> tuple[PositiveWeights, Tensor]:
    """Defines the weighted mean over the positives of each anchor.

    Args:
        labels: of the samples.
        views: rows per sample of the anchors.
        candidate_views: rows per sample of the candidates.
        self_index: as in :func:`pair_by_id`; sorted in ascending order.

    Returns:
        The weights; and [L, M], how many terms the loss of an anchor has: labels that another row has, or
        positives of each level; for overlaps their sum.
    """
    own, others, dtype = labels.own, labels.candidates, labels.threshold.dtype
    class_weights = None
    if labels.form == LEVELS:
        by_level = own.T.contiguous()
        candidate_ids = [None] * own.shape[1] if others is None else others.T.contiguous()
        terms = torch.stack([
            pair_by_id(ids, views, candidates, candidate_views, self_index)[1]
            for ids, candidates in zip(by_level, candidate_ids, strict=True)
        ])  # fmt: skip
    elif labels.form == "per_label":
        leaves_out_self = others is None or self_index is not None
        rows = (own if others is None else others).sum(0, dtype=torch.int64) * candidate_views
        rows = (rows - 1 if leaves_out_self else rows).clamp(min=0)  # other rows of an anchor with the label
        terms = repeat_per_view((own * (rows > 0)).sum(1, dtype=torch.int64), views)[None]
        class_weights = torch.where(rows > 0, 1.0 / rows.clamp(min=1).to(dtype), 0.0)
    else:
        terms = _count_overlaps(labels, views, candidate_views, self_index)[None]
    factors = torch.where(terms > 0, 1.0 / torch.where(terms > 0, terms, 1).to(dtype), 0.0)
    weights = PositiveWeights(
        labels.form, own, others, self_index, factors, class_weights, labels.threshold
    )  # fmt: skip
    return weights, terms


class InstanceIds(NamedTuple):
    """Instances of samples, int64."""

    own: Tensor
    """[B], of the anchors' samples"""
    candidates: Tensor | None
    """of the candidates' samples; None: the anchors are the candidates"""
    given: bool
    """whether the caller gave them; otherwise each sample is its own instance"""


def unused_id(ids: Tensor) -> Tensor:
    """Returns an id that is not among ``ids``, int64 of no dimensions. Nothing waits for a GPU."""
    if not ids.shape[0]:
        return ids.new_zeros(())
    ascending = torch.sort(ids)[0]
    lower, upper = ascending[:-1], ascending[1:]
    # The smallest id - 1 is free unless it wraps around. Otherwise the id below the end of the first gap is.
    gap = (upper > lower) & (upper - 1 > lower)
    free = torch.cat([ascending[:1] > torch.iinfo(torch.int64).min, gap])
    return (ascending - 1).index_select(0, free.to(torch.int8).argmax(0, keepdim=True)).squeeze(0)


def number_pairs(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Numbers the pairs (key, value) of all rows, ascending by key and then by value.

    Args:
        keys: int64, one tensor for each set of rows.
        values: the same shapes.

    Returns:
        Numbers of the shapes of ``keys``, int64.
    """
    key, value = torch.cat(list(keys)), torch.cat(list(values))
    order = torch.argsort(value, stable=True)
    order = order.index_select(0, torch.argsort(key.index_select(0, order), stable=True))
    key, value = key.index_select(0, order), value.index_select(0, order)
    new = (key[1:] != key[:-1]) | (value[1:] != value[:-1])
    number = torch.cat([torch.zeros_like(new[:1]), new]).cumsum(0) if order.shape[0] > 1 else order
    number = torch.empty_like(number).index_copy(0, order, number)
    return list(number.split([rows.shape[0] for rows in keys]))


def add_instances(
    pairing: Pairing, views: int, candidate_views: int, instances: InstanceIds
) -> tuple[Pairing, Tensor]:
    """Adds instances to a pairing.

    Args:
        pairing: by label or mask.
        views: rows per sample of the anchors.
        candidate_views: rows per sample of the candidates.
        instances: numbered by :func:`number_pairs` if the caller gave them.

    Returns:
        The pairing with instances, and |A_i| per anchor, int64 [M].
    """
    by_instance, count = pair_by_id(
        instances.own, views, instances.candidates, candidate_views, pairing.self_index
    )
    # Views of one sample are neighbours in any stable order; given instances need an order of their own.
    orders = by_instance if instances.given else pairing
    # All fields are listed because Dynamo of torch 2.11 loses fields that _replace changed.
    return Pairing(
        pairing.labels,
        orders.order,
        pairing.candidate_labels,
        orders.candidate_order,
        pairing.self_index,
        by_instance.labels,
        by_instance.candidate_labels,
        pairing.log_weights,
        pairing.candidate_log_weights,
    ), count
