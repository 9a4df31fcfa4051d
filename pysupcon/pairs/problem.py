"""From the arguments of a loss to a :class:`Problem`: rows, positives and their counts, backend.

:func:`pysupcon.contrastive.build_problem` calls :func:`prepare` once per loss. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pysupcon.caller import warn_caller
from pysupcon.pairs import modes, ops, tiled
from pysupcon.pairs.agreement import SharedArguments, check_memory_rows
from pysupcon.pairs.autograd import row_statistics
from pysupcon.pairs.backends import check_kernels, resolve_backend
from pysupcon.pairs.checks import (
    check_choice,
    check_features,
    check_hard_negatives,
    check_ids,
    check_labelling,
    check_mask,
    check_row_weights,
    check_temperature,
)
from pysupcon.pairs.global_batch import Further, Gather, GlobalBatch, build_global_batch, gather_sides
from pysupcon.pairs.many_labels import LabelOptions, check_many_labels, form_of_labels
from pysupcon.pairs.memory import MemoryArguments, check_memory
from pysupcon.pairs.normalize import unit_rows
from pysupcon.pairs.pairing import repeat_per_view, sort_rows
from pysupcon.pairs.positive_means import PositiveWeights, positive_means
from pysupcon.pairs.rows import get_positive_shift
from pysupcon.pairs.sides import Layout, Side, balance_classes, get_log_weights, join_unlabelled, lay_out
from pysupcon.pairs.statistics import Memory, Pairing, Plan, RowStatistics

__all__ = ["Gather", "Problem", "prepare"]

_warned: set[str] = set()


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


def _candidate_ids(
    name: str, ids: Tensor | None, given: Tensor | None, features: Tensor, candidates: Tensor
) -> Tensor:
    """Returns the ids of separate candidates. If neither side has ids, candidate k matches sample k."""
    if given is not None:
        if ids is None:
            raise ValueError(f"candidate_{name} were given without {name}: give both or neither")
        return check_ids(f"candidate_{name}", given, candidates)
    if ids is not None:
        raise ValueError(f"candidate_{name} must be given when {name} and candidates are")
    if candidates.shape[0] != features.shape[0]:
        raise ValueError(
            f"without {name} candidate k is matched with sample k, so candidates must hold as many "
            f"samples as features, {features.shape[0]}, got {candidates.shape[0]}"
        )
    return torch.arange(candidates.shape[0], device=candidates.device)


def _warn_of_candidate_views(features: Tensor, candidates: Tensor) -> None:
    """Warns once of candidates [B, K, D] that may be meant as negatives of each sample."""
    if torch.compiler.is_compiling() or candidates.dim() != 3 or "views" in _warned:
        return
    views = features.shape[1] if features.dim() == 3 else 1
    if candidates.shape[0] == features.shape[0] != 0 and candidates.shape[1] != views:
        _warned.add("views")
        warn_caller(
            f"candidates of shape {list(candidates.shape)} are taken as {candidates.shape[1]} views of each "
            f"sample, which are positives of that sample, but features have {views} per sample; pass "
            "negatives of each sample as hard_negatives [B, K, D] instead"
        )


def _normalized(rows: Tensor) -> Tensor:
    return unit_rows(rows).to(rows.dtype)


def _check_positives(features: Tensor, labelled: bool, need_instances: bool) -> None:
    """Checks features of one view per sample without candidates and instances."""
    if need_instances:
        raise ValueError(
            "instances must be given with features of one view per sample (they define which rows are "
            f"views of one sample), got features of shape {list(features.shape)} and instances=None"
        )
    if not labelled:
        raise ValueError(
            "labels=None takes the views of a sample as its positives, so features must be "
            "[B, V, D] with V >= 2 (or give labels, mask, instances or candidates), "
            f"got shape {list(features.shape)}"
        )


def _check_options(
    labels: Tensor | None, mask: Tensor | None, candidates: Tensor | None, candidate_labels: Tensor | None,
    candidate_instances: Tensor | None, memory: Any, hard_negatives: Tensor | None, ignore_index: Any,
    unlabeled: Any, class_balance: Any, batch_negatives: Any,
) -> None:  # fmt: skip
    """Checks which arguments go together."""
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both define the positives: give only one of them")
    if candidates is None and (candidate_labels is not None or candidate_instances is not None):
        raise ValueError("candidate_labels and candidate_instances need candidates")
    check_labelling(class_balance, batch_negatives, ignore_index, unlabeled)
    if mask is not None and memory is not None:
        raise ValueError("memory needs labels or instances, not a mask: give labels, or candidates and mask")
    if labels is None:
        if ignore_index is not None:
            raise ValueError("ignore_index needs labels, got labels=None")
        if class_balance:
            raise ValueError("class_balance needs labels, got labels=None")
    if not batch_negatives and memory is None and hard_negatives is None:
        raise ValueError("batch_negatives=False leaves no negatives: give memory or hard_negatives")


def _check_one_label(memory: Any, ignore_index: Any, class_balance: bool, batch_negatives: bool) -> None:
    """Refuses options that need one label per sample."""
    given = {
        "memory": memory is not None,
        "ignore_index": ignore_index is not None,
        "class_balance": class_balance,
        "batch_negatives=False": not batch_negatives,
    }
    for name, used in given.items():
        if used:
            raise ValueError(f"{name} needs one label per sample, labels [B], got labels [B, C]")


def prepare(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    contrast_mode: str,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    instances: Tensor | None,
    candidate_instances: Tensor | None,
    candidate_weights: Tensor | None,
    anchor_weights: Tensor | None,
    memory: Any,
    memory_labels: Tensor | None,
    memory_instances: Tensor | None,
    memory_weights: Tensor | None,
    exclude_batch_from_memory: bool,
    hard_negatives: Tensor | None,
    batch_negatives: bool,
    class_balance: bool,
    ignore_index: int | None,
    unlabeled: str,
    reduction: str,
    normalize: bool,
    backend: str,
    gather: SharedArguments | None,
    need_instances: bool,
    label_options: LabelOptions,
) -> Problem:
    """Checks the arguments of a loss and lays them out.

    Args:
        features: and all arguments up to ``backend``: see :mod:`pysupcon.functional`.
        gather: what the processes must share; None: the loss does not gather.
        need_instances: whether the loss needs to know which rows are views of one sample.
        label_options: what the loss makes of several labels per sample.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value, or arguments do not fit together.
        RuntimeError: the backend is not compiled, or its kernels cannot be used.
    """
    check_features("features", features)
    temperature = check_temperature("temperature", temperature)
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    form = form_of_labels(labels, label_options)
    tiled_only = "mask" if mask is not None else 'multi_label="any"' if form == "any" else None
    requested, backend = backend, resolve_backend(backend, features.device, tiled_only)
    _check_options(
        labels, mask, candidates, candidate_labels, candidate_instances, memory, hard_negatives,
        ignore_index, unlabeled, class_balance, batch_negatives,
    )  # fmt: skip
    if form is not None:
        _check_one_label(memory, ignore_index, class_balance, batch_negatives)
    if gather is not None and backend == "reference":
        raise ValueError('gather needs a streaming backend, got backend="reference"')
    if backend != "reference":
        modes.check_mode(features, gather is not None)
    if candidates is not None:
        check_features("candidates", candidates, like=features)
        if mask is None and candidate_labels is labels and candidate_instances is instances:
            _warn_of_candidate_views(features, candidates)
    if hard_negatives is not None:
        check_hard_negatives(hard_negatives, features)
    if mask is not None:
        mask = check_mask(mask, features, features if candidates is None else candidates)
    many = None
    if form is not None:
        many = check_many_labels(
            label_options, form, labels, candidate_labels, features, candidates, gather is not None
        )
        labels = candidate_labels = None
    related = mask is not None or many is not None  # positives come from neither labels nor instances
    labels = None if labels is None else check_ids("labels", labels, features)
    instances = None if instances is None else check_ids("instances", instances, features)
    weighted = features if candidates is None else candidates
    if candidate_weights is not None:
        candidate_weights = check_row_weights("candidate_weights", candidate_weights, weighted, zero=False)
    if anchor_weights is not None:
        anchor_weights = check_row_weights("anchor_weights", anchor_weights, features, zero=True)
    arguments = MemoryArguments(
        memory, memory_labels, memory_instances, memory_weights, exclude_batch_from_memory
    )
    bank = check_memory(arguments, features, labels is not None, instances)
    if candidates is None and instances is None and (features.dim() == 2 or features.shape[1] == 1):
        _check_positives(features, labels is not None or related, need_instances)

    if normalize:
        features = _normalized(features)
        candidates = None if candidates is None else _normalized(candidates)
        hard_negatives = None if hard_negatives is None else _normalized(hard_negatives)
        bank = None if bank is None else bank._replace(rows=_normalized(bank.rows))
    for rows in (candidates, None if bank is None else bank.rows):
        if rows is not None and rows.dtype != features.dtype:
            features = features.to(torch.promote_types(features.dtype, rows.dtype))
    candidates = None if candidates is None else candidates.to(features.dtype)
    bank = None if bank is None else bank._replace(rows=bank.rows.to(features.dtype))
    if many is not None and many.weighted:  # the two parts of a gradient are added before they are rounded
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        candidates = None if candidates is None else candidates.to(features.dtype)
    if backend == "cuda":
        backend = check_kernels(requested, features.device, features.dtype)

    # Ids per sample: of the instances, and of the positives (labels, or instances if there are no labels).
    instance_ids = instances
    need_ids = need_instances or labels is None or unlabeled == "instance"
    if instance_ids is None and need_ids:
        instance_ids = torch.arange(features.shape[0], device=features.device)
    ids = instance_ids if labels is None else labels
    assert ids is not None
    candidate_ids = candidate_instance_ids = None
    if candidates is not None:
        if labels is not None or candidate_labels is not None:
            candidate_ids = _candidate_ids("labels", labels, candidate_labels, features, candidates)
        if need_instances or unlabeled == "instance" or (labels is None and not related):
            candidate_instance_ids = _candidate_ids(
                "instances", instances, candidate_instances, features, candidates
            )
        candidate_ids = candidate_instance_ids if candidate_ids is None else candidate_ids

    communicator = None
    if gather is not None:
        if bank is not None:
            check_memory_rows(features, bank.rows, temperature)
        communicator = gather.begin(features, temperature, candidates, hard_negatives)
        if mask is not None:  # on every process
            raise ValueError("gather works with labels and instances, not with a mask: mask must be None")
        if communicator is not None and class_balance and bank is not None:
            raise ValueError(
                "class_balance needs the same candidates in every process, and the memory of each process is "
                "its own: with gather give class_balance=True or memory, not both"
            )

    # Sides: the anchors, the candidates if they are other samples, and the memory.
    x, views = _flatten_views(features)
    sides = [Side(ids, instance_ids, views)]
    candidate_rows = None
    if candidates is not None:
        candidate_rows, candidate_views = _flatten_views(candidates)
        if candidate_ids is None:  # the mask says which samples are positives
            candidate_ids = torch.arange(candidates.shape[0], device=features.device)
        sides.append(Side(candidate_ids, candidate_instance_ids, candidate_views))
    dtype = ops.stats_dtype(x)
    if communicator is not None:
        need_ids = need_instances or unlabeled == "instance" or exclude_batch_from_memory
        sides = gather_sides(communicator, sides, labels is not None, instances is not None, need_ids)
        if candidate_weights is not None:
            counted_by = communicator if candidates is None else communicator.candidates
            assert counted_by is not None
            candidate_weights = counted_by.exchange(candidate_weights.to(dtype).unsqueeze(0))[0]
        if exclude_batch_from_memory and bank is not None and bank.instances is not None:
            assert sides[0].instances is not None
            bank = bank.exclude(torch.isin(bank.instances, sides[0].instances))
    ignored = None
    if ignore_index is not None and unlabeled == "ignore":
        ignored = [repeat_per_view(side.ids == ignore_index, side.views) for side in sides]
        if bank is not None and bank.labels is not None:
            bank = bank.exclude(bank.labels == ignore_index)
    if bank is not None:
        all_ids = torch.cat([side.ids for side in sides])
        sides.append(bank.side(all_ids, sides[0].instances, labels is not None, dtype))
    if ignore_index is not None and unlabeled == "instance":
        sides = join_unlabelled(sides, ignore_index)
    anchors, *further = sides
    memory_side = further.pop() if bank is not None else None
    others = further[0] if further else None

    # The anchors, and the candidate that is the anchor itself.
    self_index, shape = None, tuple(features.shape[:-1])
    if contrast_mode == "one" and views > 1:
        if others is None:
            candidate_rows, others = x, anchors
            self_index = torch.arange(features.shape[0], device=features.device) * views
        x, anchors, shape = x[::views], anchors._replace(views=1), (features.shape[0],)
        anchor_weights = None if anchor_weights is None else anchor_weights[::views]
    counted = anchors if others is None else others
    excluded = None if ignored is None else ignored[-1]
    counted = counted._replace(log_weights=get_log_weights(candidate_weights, excluded, dtype))
    itself = int(others is None or self_index is not None)  # an anchor among its candidates
    if class_balance:
        counted, memory_side = balance_classes(counted, memory_side, dtype)
    outside: int | Tensor = 0 if hard_negatives is None else hard_negatives.shape[1]
    outside = outside if bank is None else outside + bank.candidate_count  # number of candidates
    ignored_anchors = None
    if ignored is not None:
        ignored_anchors = ignored[0][::views] if anchors.views < views else ignored[0]
    global_batch = all_anchor_weights = positive_shift = None
    if communicator is not None:
        beyond = None
        if bank is not None or hard_negatives is not None:
            beyond = Further(memory_side, None if bank is None else bank.rows, outside)
        global_batch = build_global_batch(
            communicator,
            counted if others is None else anchors,
            None if others is None else counted,
            beyond,
            separate=candidates is not None,
            labelled=labels is not None,
            need_instances=need_instances,
            ignored=ignored_anchors,
            excluded=excluded,
            batch_negatives=batch_negatives,
        )
        if class_balance and itself:
            shift = get_positive_shift(global_batch.counts.positives, dtype)
            global_batch = replace(global_batch, positive_shift=shift)
        own = global_batch.anchors
        if anchor_weights is not None:
            all_anchor_weights = own.communicator.exchange(anchor_weights.to(dtype).unsqueeze(0))[0]
        own_ids = own.ids[own.own[0] : own.own[1]]
        order = sort_rows(own_ids, own.views)[1]
        layout = Layout(
            Pairing(repeat_per_view(own_ids, own.views), order),
            *global_batch.own_counts[:2],
            mask=None,
            memory=None,
            positive_weights=None,
            memory_count=None,
        )
        count, instance_count, available = global_batch.own_counts
        ignored_anchors = None if ignored_anchors is None else ignored_anchors[own.own_rows]
    else:
        layout = lay_out(
            counted if others is None else anchors,
            None if others is None else counted,
            memory_side,
            None if bank is None else bank.rows,
            self_index,
            mask,
            many,
            need_instances and (labels is not None or related),
            instances is not None,
        )
        count, instance_count = layout.positive_count, layout.instance_count
        if need_instances and instance_count is None:
            instance_count = count  # A_i is P_i
        available = x.shape[0] if candidate_rows is None else candidate_rows.shape[0]
        available -= itself
        if excluded is not None:
            available = available - excluded.sum()
        if not batch_negatives:
            available = count if layout.memory_count is None else count - layout.memory_count
        available = available + outside
        if class_balance and itself:
            positive_shift = get_positive_shift(count, dtype)
        if ignored_anchors is not None:
            count = count.masked_fill(ignored_anchors, 0)
            instance_count = (
                None if instance_count is None else instance_count.masked_fill(ignored_anchors, 0)
            )
    return Problem(
        x,
        candidate_rows,
        temperature,
        layout.pairing,
        count,
        instance_count,
        available,
        layout.mask,
        backend,
        shape,
        global_batch,
        layout.memory,
        hard_negatives,
        batch_negatives,
        ignored_anchors,
        anchor_weights,
        all_anchor_weights,
        candidate_weights is not None or class_balance or (bank is not None and bank.weighted),
        positive_shift,
        layout.positive_weights,
    )
