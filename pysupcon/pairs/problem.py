"""From a caller's arguments to a problem the operators understand: rows, who is whose positive, counts.

Everything that depends on labels (one stable sort per set of ids, |P_i|) is done here once per call and
shared by all operators of the call. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pysupcon.pairs import modes, opaque, ops, tiled
from pysupcon.pairs.autograd import row_statistics
from pysupcon.pairs.backends import check_kernels, resolve_backend
from pysupcon.pairs.checks import (
    check_choice,
    check_features,
    check_gather,
    check_ids,
    check_mask,
    check_temperature,
)
from pysupcon.pairs.statistics import Pairing, Plan, RowStatistics
from pysupcon.pairs.unit import unit_rows

__all__ = ["Block", "Everybody", "Gather", "Problem", "Round", "matches", "prepare"]


class Block(NamedTuple):
    """Rows of samples ``start`` to ``stop`` of everybody's, numbered process after process."""

    start: int
    stop: int
    rows: Tensor | None
    """[(stop - start) * V, D]; None: the own rows"""


class Round(Protocol):
    """One loss among several processes: its forward and its backward. Every process calls the same methods in
    the same order."""

    samples: tuple[int, ...]
    """of every process"""
    rank: int
    """the own place among them"""

    def ids(self, own: Tensor) -> Tensor:
        """int64 [B] of the own samples -> [S] of everybody's."""

    def keep(self, rows: Tensor) -> Tensor | None:
        """Own rows [M, D] -> what :meth:`blocks` wants to see again, until the backward has ended."""

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        """Everybody's rows; to be exhausted or closed."""

    def exchange(self, columns: Tensor) -> Tensor:
        """Columns of the own rows [k, M] -> of everybody's [k, N]."""


class Gather(Protocol):
    """Contrasts with the rows of other processes."""

    def begin(self, features: Tensor, alike: dict[str, int]) -> Round | None:
        """Called once per loss, by every process; None: there is no other process. What must be ``alike`` on
        all of them, besides the layout, width and dtype of features, is compared.

        Raises:
            ValueError: on every process, naming what differs.
        """


@dataclass(frozen=True)
class Everybody:
    """The samples of all processes, of which the own ones are a part."""

    round: Round
    views: int
    """rows per sample"""
    ids: Tensor
    """int64 [S], of the positives: classes, or samples without labels"""
    count: Tensor
    """|P_i| of every row [N]"""
    instances: Tensor | None
    """int64 [S], ascending with the ids; None: nobody asks, or the instances are the ids"""
    instance_count: Tensor | None
    """|A_i| of every row [N]"""

    @property
    def own(self) -> tuple[int, int]:
        """Bounds of the own samples."""
        start = sum(self.round.samples[: self.round.rank])
        return start, start + self.round.samples[self.round.rank]

    @property
    def own_counts(self) -> tuple[Tensor, Tensor | None]:
        """|P_i| and |A_i| of the own rows."""
        start, stop = (bound * self.views for bound in self.own)
        other = self.instance_count
        return self.count[start:stop], None if other is None else other[start:stop]


@dataclass(frozen=True)
class Problem:
    """One call, checked and laid out. Rows of [B, V, D] are b * V + v."""

    x: Tensor
    """anchors [M, D]"""
    candidates: Tensor | None
    """[N, D]; None: the anchors themselves"""
    temperature: float | Tensor
    pairing: Pairing
    count: Tensor
    """|P_i|, int64 [M]"""
    instance_count: Tensor | None
    """|A_i|, int64 [M]"""
    mask: tiled.PositiveMask | None
    backend: str
    shape: tuple[int, ...]
    """of a loss per anchor: [B, V], [B] or [N]"""
    everybody: Everybody | None
    """None: the own rows are contrasted with one another, or with candidates"""

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def scale(self) -> Tensor:
        """1 / temperature, no dimensions, in the dtype of the statistics."""
        dtype = tiled.stats_dtype(self.x)
        if isinstance(self.temperature, Tensor):
            return self.temperature.to(device=self.x.device, dtype=dtype).reciprocal()
        if torch.compiler.is_compiling():  # torch.full would make every number a graph of its own
            return torch.ones((), dtype=dtype, device=self.x.device) / self.temperature
        return torch.full((), 1.0 / self.temperature, dtype=dtype, device=self.x.device)

    def statistics(
        self, *, negatives: bool = False, positives: bool = False, epsilon: float | None = None
    ) -> RowStatistics:
        """Exactly the statistics asked for; ``epsilon`` asks for the softplus sum, which needs
        ``negatives``."""
        plan = Plan(self.backend, self.pairing, self.mask, negatives, positives, epsilon)
        statistics = row_statistics(self.x, self.candidates, self.scale, plan)
        return statistics if self.pairing.instances is not None else statistics.without_instances()


def _layout(features: Tensor) -> tuple[Tensor, int]:
    """Rows [B * V, D] (a view wherever strides allow) and V."""
    views = features.shape[1] if features.dim() == 3 else 1
    rows = features if features.dim() == 2 else features.reshape(-1, features.shape[-1])
    return (rows if rows.stride(1) == 1 else rows.contiguous()), views


def _rows_of(ids: Tensor, views: int) -> Tensor:
    """One value per sample -> one per row."""
    return ids if views == 1 else ids.unsqueeze(1).expand(-1, views).reshape(-1).contiguous()


def _sort(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Sorted ids [B], and the stable argsort of the rows [B * V]."""
    sorted_ids, order = torch.sort(ids, stable=True)
    if views > 1:
        order = (order.unsqueeze(1) * views + torch.arange(views, device=ids.device)).reshape(-1)
    return sorted_ids, order


def matches(sorted_ids: Tensor, ids: Tensor, views: int = 1) -> Tensor:
    """How many rows bear each id."""
    rows = torch.searchsorted(sorted_ids, ids, right=True).sub_(torch.searchsorted(sorted_ids, ids))
    return rows if views == 1 else rows.mul_(views)


def _order_and_count(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """The stable argsort of the rows [B * V], and how many other rows bear a row's id."""
    # Under vmap torch's own operators, which have a rule for it.
    whole = torch.compiler.is_compiling() or not modes.transformed()
    if ids.device.type == "cpu" and ops.compiled_for("cpu") and whole:
        order, count = ops.order_by_class(ids, views)
        return order, count
    sorted_ids, order = _sort(ids, views)
    return order, _rows_of(matches(sorted_ids, ids, views).sub_(1), views)


def _pair(
    ids: Tensor,
    views: int,
    candidate_ids: Tensor | None,
    candidate_views: int,
    self_index: Tensor | None,
) -> tuple[Pairing, Tensor]:
    """Positives are the rows of the same id. Ids are per sample; returns the pairing and |P_i| per row."""
    labels = _rows_of(ids, views)
    if candidate_ids is None:
        order, count = _order_and_count(ids, views)
        return Pairing(labels, order), count
    order = _sort(ids, views)[1]
    sorted_candidates, candidate_order = _sort(candidate_ids, candidate_views)
    count = _rows_of(matches(sorted_candidates, ids, candidate_views), views)
    if self_index is not None:
        count = count - 1
    candidate_labels = _rows_of(candidate_ids, candidate_views)
    return Pairing(labels, order, candidate_labels, candidate_order, self_index), count


class _Instances(NamedTuple):
    """Of samples, int64."""

    own: Tensor
    """[B]"""
    candidates: Tensor | None
    """of separate candidates, or of the anchors where they are a part of the candidates; None: nobody else"""
    given: bool
    """by the caller; otherwise every sample is its own, and views of a sample are neighbours anyway"""


def _by_label(ids: Tensor, other_ids: Tensor | None, given: _Instances) -> _Instances:
    """Numbers of the pairs (id, instance), ascending by id and then by instance: rows of one number are of
    one instance and one class, and whoever sorts by the number sorts by the class."""
    keys, instances = ids, given.own
    if other_ids is not None and given.candidates is not None:
        keys, instances = torch.cat([ids, other_ids]), torch.cat([instances, given.candidates])
    order = torch.argsort(instances, stable=True)
    order = order.index_select(0, torch.argsort(keys.index_select(0, order), stable=True))
    keys, instances = keys.index_select(0, order), instances.index_select(0, order)
    new = (keys[1:] != keys[:-1]) | (instances[1:] != instances[:-1])
    number = torch.cat([torch.zeros_like(new[:1]), new]).cumsum(0) if order.shape[0] > 1 else order
    number = torch.empty_like(number).index_copy(0, order, number)
    own = ids.shape[0]
    others = None if given.candidates is None else number[own:] if other_ids is not None else number
    return _Instances(number[:own], others, given=True)


def _pair_instances(
    pairing: Pairing, views: int, candidate_views: int, instances: _Instances
) -> tuple[Pairing, Tensor]:
    """Says which positives are of one instance, too; and |A_i| per row."""
    by_instance, count = _pair(
        instances.own, views, instances.candidates, candidate_views, pairing.self_index
    )
    source = by_instance if instances.given else pairing  # by label and instance, if that makes a difference
    # Spelt out: Dynamo of torch 2.11 loses fields that _replace changed.
    return Pairing(
        pairing.labels,
        source.order,
        pairing.candidate_labels,
        source.candidate_order,
        pairing.self_index,
        by_instance.labels,
        by_instance.candidate_labels,
    ), count


def _masked(
    mask: Tensor, views: int, candidate_views: int, self_index: Tensor | None, rectangular: bool
) -> tuple[Pairing, Tensor, tiled.PositiveMask]:
    rows = _rows_of(torch.arange(mask.shape[0], device=mask.device), views)
    columns = _rows_of(torch.arange(mask.shape[1], device=mask.device), candidate_views)
    positives = tiled.PositiveMask(mask, rows, columns)
    if modes.runs_plainly(mask):
        count = tiled.positive_count(positives, self_index, symmetric=not rectangular)
    else:
        count = opaque.positive_count(*positives, self_index, not rectangular)
    order, candidate_order = (torch.arange(side.shape[0], device=mask.device) for side in (rows, columns))
    if not rectangular:
        return Pairing(rows, order), count, positives
    return Pairing(rows, order, columns, candidate_order, self_index), count, positives


def _candidate_ids(
    name: str, ids: Tensor | None, given: Tensor | None, features: Tensor, candidates: Tensor
) -> Tensor:
    """Ids of separate candidates; with neither side given, candidates are matched with features by
    position."""
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


def _normalized(rows: Tensor) -> Tensor:
    return unit_rows(rows).to(rows.dtype)


def _wants_gradient(features: Tensor, temperature: float | Tensor) -> bool:
    learns = isinstance(temperature, Tensor) and temperature.requires_grad
    return torch.is_grad_enabled() and (features.requires_grad or learns)


def _everybody(
    round: Round, features: Tensor, labels: Tensor | None, instances: Tensor | None, need_instances: bool
) -> Everybody:
    """Ids of all processes' samples. An instance is the same wherever it stands; without instances every
    sample is its own."""
    views = features.shape[1] if features.dim() == 3 else 1
    if instances is not None and (need_instances or labels is None):
        samples = round.ids(instances)
    else:
        samples = torch.arange(sum(round.samples), device=features.device)
    ids = samples if labels is None else round.ids(labels)
    count = _pair(ids, views, None, 1, None)[1]
    if not need_instances:
        return Everybody(round, views, ids, count, None, None)
    if ids is samples:
        return Everybody(round, views, ids, count, None, count)
    samples = _by_label(ids, None, _Instances(samples, None, given=True)).own
    return Everybody(round, views, ids, count, samples, _pair(samples, views, None, 1, None)[1])


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
    reduction: str,
    normalize: bool,
    backend: str,
    gather: Gather | None,
    need_instances: bool,
) -> Problem:
    """Check everything and lay it out."""
    check_features("features", features)
    temperature = check_temperature("temperature", temperature)
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    wish, backend = backend, resolve_backend(backend, features.device, mask is not None)
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both say who is a positive: give one of them")
    if candidates is None and (candidate_labels is not None or candidate_instances is not None):
        raise ValueError("candidate_labels and candidate_instances need candidates")
    if gather is not None and (candidates is not None or mask is not None or contrast_mode != "all"):
        raise ValueError(
            'gather works with features and labels only: no candidates, no mask, contrast_mode="all"'
        )
    if gather is not None and backend == "reference":
        raise ValueError('gather needs a streaming backend, got backend="reference"')
    if gather is not None:
        check_gather(gather)
    if backend != "reference":
        modes.check_mode(features, gather is not None)
    separate = candidates is not None
    if candidates is not None:
        check_features("candidates", candidates, like=features)
    if mask is not None:
        mask = check_mask(mask, features, features if candidates is None else candidates)
    samples = features.shape[0]
    own_labels = None if labels is None else check_ids("labels", labels, features)
    own_instances = None if instances is None else check_ids("instances", instances, features)
    alone = features.dim() == 2 or features.shape[1] == 1
    if alone and not separate and own_instances is None:
        if need_instances:
            raise ValueError(
                "instances must be given with features of one view per sample (they say which rows are "
                f"views of one sample), got features of shape {list(features.shape)} and instances=None"
            )
        if own_labels is None and mask is None:
            raise ValueError(
                "labels=None takes the views of a sample as its positives, so features must be "
                "[B, V, D] with V >= 2 (or give labels, mask, instances or candidates), "
                f"got shape {list(features.shape)}"
            )

    if normalize:
        features = _normalized(features)
        candidates = None if candidates is None else _normalized(candidates)
    if candidates is not None and candidates.dtype != features.dtype:
        dtype = torch.promote_types(candidates.dtype, features.dtype)
        features, candidates = features.to(dtype), candidates.to(dtype)
    if backend == "cuda":
        backend = check_kernels(wish, features.device, features.dtype)

    # Ids per sample: of the instances, and of the positives (classes, or samples without labels).
    device = features.device
    ids, sample_ids = own_labels, own_instances
    if sample_ids is None and (need_instances or ids is None):
        sample_ids = torch.arange(samples, device=device)
    ids = sample_ids if ids is None else ids
    assert ids is not None
    other_ids = other_sample_ids = None
    if candidates is not None:
        if own_labels is not None or candidate_labels is not None:
            other_ids = _candidate_ids("labels", own_labels, candidate_labels, features, candidates)
        if need_instances or (own_labels is None and mask is None):
            other_sample_ids = _candidate_ids(
                "instances", own_instances, candidate_instances, features, candidates
            )
        other_ids = other_sample_ids if other_ids is None else other_ids

    everybody = None
    if gather is not None:
        alike = {
            "labels given": own_labels is not None,
            "instances given": own_instances is not None,
            "gradient wanted": _wants_gradient(features, temperature),
        }
        round = gather.begin(features, {name: int(value) for name, value in alike.items()})
        if round is not None:
            everybody = _everybody(round, features, own_labels, own_instances, need_instances)

    # Rows: which are anchors, which are candidates, and which candidate is the anchor itself.
    rows, views = _layout(features)
    x, x_views, self_index, shape = rows, views, None, tuple(features.shape[:-1])
    others, other_views = (None, 1) if candidates is None else _layout(candidates)
    if contrast_mode == "one" and views > 1:
        x, x_views, shape = rows[::views], 1, (samples,)
        if others is None:
            others, other_views = rows, views
            other_ids, other_sample_ids = ids, sample_ids
            self_index = torch.arange(samples, device=device) * views
    positives = None
    if mask is not None:
        mask_views = views if others is None else other_views
        pairing, count, positives = _masked(mask, x_views, mask_views, self_index, others is not None)
    else:
        pairing, count = _pair(ids, x_views, other_ids, other_views, self_index)
    instance_count = None
    if need_instances and ids is sample_ids and positives is None:
        instance_count = count  # A_i is P_i
    elif need_instances:
        assert sample_ids is not None
        given = _Instances(sample_ids, other_sample_ids, own_instances is not None)
        if positives is not None:
            given = given._replace(given=False)  # nothing is sorted where a mask says who is what
        elif given.given:
            given = _by_label(ids, None if other_ids is ids else other_ids, given)
        pairing, instance_count = _pair_instances(pairing, x_views, other_views, given)
    return Problem(
        x,
        others,
        temperature,
        pairing,
        count,
        instance_count,
        positives,
        backend,
        shape,
        everybody,
    )
