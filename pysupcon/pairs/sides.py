"""The samples on each side of the pairs: the anchors, the candidates and the memory.

A :class:`Side` has ids, instances and weights. :func:`lay_out` turns the sides into the index arguments of
the operators and the counts of every anchor. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import tiled
from pysupcon.pairs.many_labels import ManyLabels
from pysupcon.pairs.pairing import (
    InstanceIds,
    add_instances,
    count_matches,
    number_pairs,
    pair_apart,
    pair_by_id,
    pair_by_mask,
    pair_by_overlap,
    repeat_per_view,
    sort_rows,
    weigh_positives,
)
from pysupcon.pairs.positive_means import PositiveWeights
from pysupcon.pairs.statistics import Memory, Pairing

__all__ = ["Layout", "Side", "balance_classes", "get_log_weights", "join_unlabelled", "lay_out"]


class Side(NamedTuple):
    """S samples with V rows each."""

    ids: Tensor
    """int64 [S]: what positives have in common, the label or (without labels) the instance"""
    instances: Tensor | None
    """int64 [S]; None: not needed"""
    views: int
    log_weights: Tensor | None = None
    """[S * V] as candidates, statistics dtype, -inf for a row that is no candidate; None: all are 0"""


class Layout(NamedTuple):
    """Index arguments of the operators, and counts per anchor."""

    pairing: Pairing
    positive_count: Tensor
    """|P_i|, int64 [M]"""
    instance_count: Tensor | None
    """|A_i|, int64 [M]; None: not needed"""
    mask: tiled.PositiveMask | None
    memory: Memory | None
    positive_weights: PositiveWeights | None
    """not None: a weighted mean of s takes the place of positives, and ``positive_count`` is [L, M]"""
    memory_count: Tensor | None
    """how many of |P_i| are rows of the memory, int64 [M]; None: there is no memory"""


def get_log_weights(weights: Tensor | None, excluded: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns log weights, -inf where excluded.

    Args:
        weights: of each row; None: 1.
        excluded: bool of each row; None: no row.
        dtype: of the result.
    """
    if weights is not None:
        log_weights = weights.to(dtype).log()
        return log_weights if excluded is None else log_weights.masked_fill(excluded, -math.inf)
    if excluded is None:
        return None
    return torch.zeros(excluded.shape, dtype=dtype, device=excluded.device).masked_fill(excluded, -math.inf)


def join_unlabelled(sides: Sequence[Side], ignore_index: int) -> list[Side]:
    """Makes every instance of the label ``ignore_index`` a class of its own."""
    instances = []
    for side in sides:
        assert side.instances is not None
        instances.append(torch.where(side.ids == ignore_index, side.instances, 0))
    numbers = number_pairs([side.ids for side in sides], instances)
    return [side._replace(ids=number) for side, number in zip(sides, numbers, strict=True)]


def balance_classes(candidates: Side, memory: Side | None, dtype: torch.dtype) -> tuple[Side, Side | None]:
    """Divides the weight of each row by the number of rows of its class.

    Args:
        candidates: the candidates of the batch.
        memory: further candidates of one row per sample; rows that are no candidates have other ids.
        dtype: of log weights.
    """
    sides = [candidates] if memory is None else [candidates, memory]
    ascending = [torch.sort(side.ids)[0] for side in sides]
    balanced = []
    for side in sides:
        count = torch.zeros_like(side.ids)
        for other, ids in zip(sides, ascending, strict=True):
            count = count + count_matches(ids, side.ids, other.views)
        share = -repeat_per_view(count, side.views).to(dtype).log()
        log_weights = share if side.log_weights is None else side.log_weights + share
        balanced.append(side._replace(log_weights=log_weights))
    return balanced[0], balanced[1] if memory is not None else None


def _number_instances(sides: Sequence[Side | None]) -> list[Side | None]:
    """Numbers the pairs (id, instance) of all sides; the numbers become the instances."""
    some = [side for side in sides if side is not None]
    instances = [side.instances for side in some if side.instances is not None]
    numbers = iter(number_pairs([side.ids for side in some], instances))
    return [None if side is None else side._replace(instances=next(numbers)) for side in sides]


def lay_out(
    anchors: Side,
    candidates: Side | None,
    memory: Side | None,
    memory_rows: Tensor | None,
    self_index: Tensor | None,
    mask: Tensor | None,
    many: ManyLabels | None,
    need_instances: bool,
    given_instances: bool,
) -> Layout:
    """Lays out the pairs of anchors with candidates and memory.

    Args:
        anchors: side of the anchors.
        candidates: side of the candidates; None: the anchors.
        memory: side of the memory, one row per sample; None: there is none.
        memory_rows: rows of the memory [Nm, D].
        self_index: int64 [M], the candidate row that is the anchor itself; None: no anchor is a candidate.
        mask: bool [samples of the anchors, samples of the candidates], positives instead of equal ids.
        many: several labels per sample, positives instead of equal ids.
        need_instances: whether the loss needs |A_i| and ids are not instances.
        given_instances: whether the caller gave instances; otherwise samples are instances.
    """
    views = 1 if candidates is None else candidates.views
    positives = instance_count = weights = None
    columns = anchors.views if candidates is None else views
    if many is not None and candidates is not None and many.candidates is None:
        many = many._replace(candidates=many.own)
    if many is not None and many.weighted:
        others = None if candidates is None else candidates.ids.shape[0] * views
        pairing = pair_apart(anchors.ids.shape[0] * anchors.views, others, self_index, anchors.ids)
        weights, count = weigh_positives(many, anchors.views, columns, self_index)
    elif many is not None:
        pairing, count, positives = pair_by_overlap(
            many, anchors.views, columns, self_index, rectangular=candidates is not None
        )
    elif mask is not None:
        pairing, count, positives = pair_by_mask(
            mask, anchors.views, columns, self_index, rectangular=candidates is not None
        )
    else:
        other_ids = None if candidates is None else candidates.ids
        pairing, count = pair_by_id(anchors.ids, anchors.views, other_ids, views, self_index)
    numbered = need_instances and given_instances and mask is None and many is None  # sorted by label
    if need_instances:
        if numbered:
            first, candidates, memory = _number_instances([anchors, candidates, memory])
            assert first is not None
            anchors = first
        assert anchors.instances is not None
        other_instances = None if candidates is None else candidates.instances
        paired = InstanceIds(anchors.instances, other_instances, numbered)
        pairing, instance_count = add_instances(pairing, anchors.views, views, paired)
    rows = memory_count = None
    if memory is not None and memory_rows is not None:
        ascending, order = sort_rows(memory.ids, 1)
        memory_count = repeat_per_view(count_matches(ascending, anchors.ids), anchors.views)
        count = count + memory_count
        instances = memory.instances if need_instances else None
        if numbered and instances is not None and anchors.instances is not None:
            # Without numbers, no row of the memory is of an instance of the batch.
            ascending, order = sort_rows(instances, 1)
            assert instance_count is not None
            matches = count_matches(ascending, anchors.instances)
            instance_count = instance_count + repeat_per_view(matches, anchors.views)
        rows = Memory(memory_rows, memory.ids, order, instances, memory.log_weights)
    one_set = candidates is None
    log_weights = anchors.log_weights if candidates is None else candidates.log_weights
    # All fields are listed because Dynamo of torch 2.11 loses fields that _replace changed.
    pairing = Pairing(*pairing[:7], log_weights if one_set else None, None if one_set else log_weights)
    return Layout(pairing, count, instance_count, positives, rows, weights, memory_count)
