"""From the arguments of a loss to a :class:`Problem`: rows, positives and their counts, backend.

:func:`pysupcon.contrastive.build_problem` calls :func:`prepare` once per loss. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs import ops, tiled
from pysupcon.pairs.agreement import SharedArguments, check_memory_rows
from pysupcon.pairs.arguments import Arguments, check_arguments
from pysupcon.pairs.autograd import row_statistics
from pysupcon.pairs.global_batch import (
    AnchorCounts,
    Communicator,
    Further,
    Gather,
    GlobalBatch,
    build_global_batch,
    gather_sides,
)
from pysupcon.pairs.memory import MemoryRows
from pysupcon.pairs.pairing import repeat_per_view, sort_rows
from pysupcon.pairs.positive_means import PositiveWeights, positive_means
from pysupcon.pairs.rows import get_positive_shift
from pysupcon.pairs.sides import Layout, Side, balance_classes, get_log_weights, join_unlabelled, lay_out
from pysupcon.pairs.statistics import Memory, Pairing, Plan, RowStatistics

__all__ = ["Gather", "Problem", "prepare"]


@dataclass(frozen=True)
class Problem:
    """One call of a loss, checked and laid out. View v of sample b is row b * V + v."""

    x: Tensor
    """anchors [M, D]"""
    candidates: Tensor | None
    """[N, D]; None: the anchors themselves"""
    temperature: float | Tensor
    pairing: Pairing
    """with a global batch: labels and order of the anchors only"""
    count: Tensor
    """|P_i|, int64 [M]; with ``positive_weights`` [L, M], 0 for an anchor without a loss"""
    instance_count: Tensor | None
    """|A_i|, int64 [M]"""
    candidate_count: int | Tensor
    """|P_i| + |N_i|: one number for all anchors, or int64 [M]"""
    mask: tiled.PositiveMask | None
    backend: str
    shape: tuple[int, ...]
    """of the losses with ``reduction="none"``: [B, V], [B] or [N]"""
    global_batch: GlobalBatch | None
    """None: the candidates are rows of this process only"""
    memory: Memory | None = None
    hard_negatives: Tensor | None = None
    """[B, K, D], negatives of the anchors of one sample"""
    batch_negatives: bool = True
    """False: no candidate is a negative; those of memory and hard_negatives are"""
    ignored: Tensor | None = None
    """bool [M], anchors whose label is ignored; None: there are none. Their counts are 0"""
    anchor_weights: Tensor | None = None
    """[M], in the reductions"""
    all_anchor_weights: Tensor | None = None
    """those of the anchors of all processes, [N]; given with a global batch"""
    weighted: bool = False
    """whether candidates have weights other than 0 and 1"""
    positive_shift: Tensor | None = None
    """[M], added to the log weights of the anchor's positives; None: 0"""
    positive_weights: PositiveWeights | None = None
    """not None: all other rows are negatives, and a weighted mean of s takes the place of positives"""

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def scale(self) -> Tensor:
        """1 / temperature, no dimensions, in the dtype of the statistics."""
        dtype = ops.stats_dtype(self.x)
        if isinstance(self.temperature, Tensor):
            return self.temperature.to(device=self.x.device, dtype=dtype).reciprocal()
        if torch.compiler.is_compiling():  # torch.full would compile a graph for each number
            return torch.ones((), dtype=dtype, device=self.x.device) / self.temperature
        return torch.full((), 1.0 / self.temperature, dtype=dtype, device=self.x.device)

    def statistics(
        self, *, negatives: bool = False, positives: bool = False, epsilon: float | Tensor | None = None
    ) -> RowStatistics:
        """Computes the statistics of every anchor, differentiable once.

        Args:
            negatives: compute n.
            positives: compute p and the sums over positives.
            epsilon: compute the softplus sum with this epsilon, which needs ``negatives``; None: do not.

        Returns:
            The requested statistics; the values of the others are undefined.
        """
        positives = positives and self.positive_weights is None
        shift = self.positive_shift
        if shift is not None and epsilon is not None:
            # log(k w + e^(n - s + epsilon)) = log k + log(w + e^(n - s + epsilon - log k))
            epsilon = epsilon - shift
        plan = Plan(
            self.backend, self.pairing, self.mask, negatives, positives, epsilon, self.memory,
            self.batch_negatives,
        )  # fmt: skip
        outside = self.hard_negative_logsumexp() if negatives else None
        statistics = row_statistics(self.x, self.candidates, self.scale, outside, plan)
        if shift is not None:
            n, p, positive_sum, instance_sum, softplus = statistics
            softplus = softplus if epsilon is None else softplus + self.count * shift
            statistics = RowStatistics(n, p + shift, positive_sum, instance_sum, softplus)
        return statistics if self.pairing.instances is not None else statistics.without_instances()

    def hard_negative_similarity(self) -> Tensor | None:
        """s of the anchors and their own negatives [M, K], at least float32; None without hard_negatives."""
        if self.hard_negatives is None:
            return None
        samples, _, width = self.hard_negatives.shape
        views = self.shape[1] if len(self.shape) == 2 else 1
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        with tiled.no_autocast(self.x):
            rows = self.x.to(dtype).reshape(samples, views, width)
            products = torch.bmm(rows, self.hard_negatives.to(dtype).transpose(1, 2)).flatten(0, 1)
            return products * self.scale.to(dtype)

    def hard_negative_logsumexp(self) -> Tensor | None:
        """log sum of e^s over the own negatives of each anchor, [M] in the statistics dtype."""
        similarity = self.hard_negative_similarity()
        return None if similarity is None else similarity.to(ops.stats_dtype(self.x)).logsumexp(dim=1)

    def positive_means(self) -> Tensor:
        """Computes the weighted means of s over positives, [L, M]; only with ``positive_weights``."""
        assert self.positive_weights is not None
        return positive_means(self.x, self.candidates, self.scale, self.positive_weights)


def _flatten_views(features: Tensor) -> tuple[Tensor, int]:
    """Returns the rows [B * V, D], a view if the strides allow it, and V."""
    views = features.shape[1] if features.dim() == 3 else 1
    rows = features if features.dim() == 2 else features.reshape(-1, features.shape[-1])
    return (rows if rows.stride(1) == 1 else rows.contiguous()), views


def _begin(gather: SharedArguments, given: Arguments, class_balance: bool) -> Communicator | None:
    """Starts the communication of a gathered loss; None if there is no other process."""
    memory = given.memory
    if memory is not None:
        check_memory_rows(given.features, memory.rows, given.temperature)
    communicator = gather.begin(given.features, given.temperature, given.candidates, given.hard_negatives)
    if given.mask is not None:  # on every process
        raise ValueError("gather works with labels and instances, not with a mask: mask must be None")
    if communicator is not None and class_balance and memory is not None:
        raise ValueError(
            "class_balance needs the same candidates in every process, and the memory of each process is "
            "its own: with gather give class_balance=True or memory, not both"
        )
    return communicator


class _Pairs(NamedTuple):
    """What the anchors are contrasted with, in this process or in all processes."""

    anchors: Side
    candidates: Side | None
    """None: the anchors"""
    memory: MemoryRows | None
    memory_side: Side | None
    self_index: Tensor | None
    """int64 [M], the candidate row that is the anchor itself; None: no anchor is a candidate"""
    ignored: Tensor | None
    """bool, anchor rows of the ignored label; None: there are none"""
    excluded: Tensor | None
    """bool, candidate rows that are no candidates; None: there are none"""

    @property
    def itself(self) -> int:
        """Whether an anchor is among its candidates, as a number."""
        return int(self.candidates is None or self.self_index is not None)


def _pair(
    given: Arguments, communicator: Communicator | None, need_instances: bool, options: Mapping[str, Any]
) -> _Pairs:
    """Finds the anchors, the candidates and the memory, and the weights of their rows."""
    memory, dtype = given.memory, ops.stats_dtype(given.features)
    sides = [Side(given.ids, given.instances, _views(given.features))]
    if given.candidates is not None and given.candidate_ids is not None:
        views = _views(given.candidates)
        sides.append(Side(given.candidate_ids, given.candidate_instances, views))
    weights = given.candidate_weights
    unlabeled, ignore_index = options["unlabeled"], options["ignore_index"]
    exclude = options["exclude_batch_from_memory"]
    if communicator is not None:
        need_ids = need_instances or unlabeled == "instance" or exclude
        sides = gather_sides(communicator, sides, given.labelled, given.instances_given, need_ids)
        if weights is not None:
            counted_by = communicator if given.candidates is None else communicator.candidates
            assert counted_by is not None
            weights = counted_by.exchange(weights.to(dtype).unsqueeze(0))[0]
    if exclude and memory is not None:
        assert memory.instances is not None
        assert sides[0].instances is not None
        memory = memory.exclude(torch.isin(memory.instances, sides[0].instances))
    ignored = excluded = None
    if ignore_index is not None and unlabeled == "ignore":
        of_sides = [repeat_per_view(side.ids == ignore_index, side.views) for side in sides]
        ignored, excluded = of_sides[0], of_sides[-1]
        if memory is not None and memory.labels is not None:
            memory = memory.exclude(memory.labels == ignore_index)
    if memory is not None:
        every = torch.cat([side.ids for side in sides])
        sides.append(memory.side(every, sides[0].instances, given.labelled, dtype))
    if ignore_index is not None and unlabeled == "instance":
        sides = join_unlabelled(sides, ignore_index)
    anchors, *further = sides
    memory_side = further.pop() if memory is not None else None
    candidates = further[0] if further else None
    self_index = None
    if options["contrast_mode"] == "one" and anchors.views > 1:
        step = anchors.views
        if candidates is None:
            candidates = anchors
            self_index = torch.arange(given.features.shape[0], device=anchors.ids.device) * step
        ignored = None if ignored is None else ignored[::step]
        anchors = anchors._replace(views=1)
    counted = anchors if candidates is None else candidates
    counted = counted._replace(log_weights=get_log_weights(weights, excluded, dtype))
    if options["class_balance"]:
        counted, memory_side = balance_classes(counted, memory_side, dtype)
    if candidates is None:
        anchors = counted
    else:
        candidates = counted
    return _Pairs(anchors, candidates, memory, memory_side, self_index, ignored, excluded)


def _views(features: Tensor) -> int:
    return features.shape[1] if features.dim() == 3 else 1


def _count(
    layout: Layout, pairs: _Pairs, rows: int, outside: int | Tensor, need_instances: bool,
    batch_negatives: bool,
) -> AnchorCounts:  # fmt: skip
    """Counts the candidates of every anchor of a loss that does not gather.

    Args:
        layout: of the pairs.
        pairs: anchors and candidates.
        rows: number of candidate rows.
        outside: number of candidates in the memory and of hard negatives.
        need_instances: whether the loss needs |A_i|.
        batch_negatives: whether rows of the batch are negatives.
    """
    count, instances = layout.positive_count, layout.instance_count
    if need_instances and instances is None:
        instances = count  # A_i is P_i
    available: int | Tensor = rows - pairs.itself
    if pairs.excluded is not None:
        available = available - pairs.excluded.sum()
    if not batch_negatives:
        available = count if layout.memory_count is None else count - layout.memory_count
    if pairs.ignored is not None:
        count = count.masked_fill(pairs.ignored, 0)
        instances = None if instances is None else instances.masked_fill(pairs.ignored, 0)
    return AnchorCounts(count, instances, available + outside)


def prepare(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    gather: SharedArguments | None,
    need_instances: bool,
    **options: Any,
) -> Problem:
    """Checks the arguments of a loss and lays them out.

    Args:
        features: as in :mod:`pysupcon.functional`, like ``labels`` and ``mask``.
        labels: or None.
        mask: or None.
        gather: what the processes must share; None: the loss does not gather.
        need_instances: whether the loss needs to know which rows are views of one sample.
        **options: further arguments of :func:`pysupcon.pairs.arguments.check_arguments`, whose errors this
            function raises.
    """
    given = check_arguments(
        features, labels, mask, gathered=gather is not None, need_instances=need_instances, **options
    )
    class_balance, batch_negatives = options["class_balance"], options["batch_negatives"]
    communicator = None if gather is None else _begin(gather, given, class_balance)
    pairs = _pair(given, communicator, need_instances, options)

    # Rows: the anchors and the candidates.
    x, views = _flatten_views(given.features)
    candidate_rows = None if given.candidates is None else _flatten_views(given.candidates)[0]
    anchor_weights, shape = given.anchor_weights, tuple(given.features.shape[:-1])
    if pairs.anchors.views < views:
        candidate_rows = x if candidate_rows is None else candidate_rows
        x, shape = x[::views], (given.features.shape[0],)
        anchor_weights = None if anchor_weights is None else anchor_weights[::views]

    memory, hard_negatives = pairs.memory, given.hard_negatives
    memory_rows = None if memory is None else memory.rows
    outside: int | Tensor = 0 if hard_negatives is None else hard_negatives.shape[1]
    outside = outside if memory is None else outside + memory.candidate_count  # number of candidates
    global_batch = all_anchor_weights = positive_shift = layout = None
    ignored = pairs.ignored
    if communicator is None:
        layout = lay_out(
            pairs.anchors,
            pairs.candidates,
            pairs.memory_side,
            memory_rows,
            pairs.self_index,
            given.mask,
            given.many,
            need_instances and (given.labelled or given.mask is not None or given.many is not None),
            given.instances_given or given.candidates is not None,
        )
        pairing = layout.pairing
        rows = x.shape[0] if candidate_rows is None else candidate_rows.shape[0]
        counts = _count(layout, pairs, rows, outside, need_instances, batch_negatives)
        if class_balance and pairs.itself:
            positive_shift = get_positive_shift(layout.positive_count, ops.stats_dtype(x))
    else:
        beyond = None
        if memory is not None or hard_negatives is not None:
            beyond = Further(pairs.memory_side, memory_rows, outside)
        global_batch = build_global_batch(
            communicator,
            pairs.anchors,
            pairs.candidates,
            beyond,
            separate=given.candidates is not None,
            labelled=given.labelled,
            need_instances=need_instances,
            ignored=ignored,
            excluded=pairs.excluded,
            batch_negatives=batch_negatives,
        )
        if class_balance and pairs.itself:
            shift = get_positive_shift(global_batch.counts.positives, ops.stats_dtype(x))
            global_batch = replace(global_batch, positive_shift=shift)
        own = global_batch.anchors
        if anchor_weights is not None:
            sent = anchor_weights.to(ops.stats_dtype(x)).unsqueeze(0)
            all_anchor_weights = own.communicator.exchange(sent)[0]
        own_ids = own.ids[own.own[0] : own.own[1]]
        pairing = Pairing(repeat_per_view(own_ids, own.views), sort_rows(own_ids, own.views)[1])
        counts = global_batch.own_counts
        ignored = None if ignored is None else ignored[own.own_rows]
    return Problem(
        x=x,
        candidates=candidate_rows,
        temperature=given.temperature,
        pairing=pairing,
        count=counts.positives,
        instance_count=counts.instances,
        candidate_count=counts.candidates,
        mask=None if layout is None else layout.mask,
        backend=given.backend,
        shape=shape,
        global_batch=global_batch,
        memory=None if layout is None else layout.memory,
        hard_negatives=hard_negatives,
        batch_negatives=batch_negatives,
        ignored=ignored,
        anchor_weights=anchor_weights,
        all_anchor_weights=all_anchor_weights,
        weighted=given.candidate_weights is not None
        or class_balance
        or (memory is not None and memory.weighted),
        positive_shift=positive_shift,
        positive_weights=None if layout is None else layout.positive_weights,
    )
