"""From a caller's arguments to a problem the operators understand: rows, who is whose positive, counts.

Everything that depends on labels (one stable sort per set of ids, |P_i|) is done here once per call and
shared by all operators of the call. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiled
from ._autograd import Pairing, Plan, RowStatistics, row_statistics
from ._checks import (
    check_choice,
    check_features,
    check_ids,
    check_mask,
    check_temperature,
    resolve_backend,
)

__all__ = ["Gather", "Problem", "prepare"]


class Gather(Protocol):
    """What a distributed gather offers to the losses; every process calls every method equally often."""

    def sample_ids(self, count: int, device: torch.device) -> Tensor:
        """int64 [count]: ids of this process's own samples, different from those of every other process."""

    def rows(self, rows: Tensor, ids: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Own rows [M, D] and int64 columns [M] -> all rows [N, D] without a graph, all columns [N], and the
        index [M] of the own rows among them."""

    def exchange(self, columns: Tensor) -> Tensor:
        """Own columns [k, M] -> everybody's [k, N], in the order of :meth:`rows`. Called in the backward."""

    def anchors(self, count: Tensor) -> Tensor:
        """Own number of valid anchors -> what to divide the own sum by, so that the mean over processes of
        the losses is the mean over all anchors."""


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
    instances: Pairing | None
    instance_count: Tensor | None
    """|A_i|, int64 [M]"""
    mask: tiled.PositiveMask | None
    backend: str
    shape: tuple[int, ...]
    """of a loss per anchor: [B, V], [B] or [N]"""
    gather: Gather | None

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    def statistics(
        self,
        *,
        negatives: bool = False,
        positives: bool = False,
        epsilon: float | None = None,
        positive_sum: bool = False,
        instance_sum: bool = False,
    ) -> RowStatistics:
        """Exactly the statistics asked for; ``epsilon`` asks for the softplus sum, which needs
        ``negatives``."""
        dtype = tiled.stats_dtype(self.x)
        if isinstance(self.temperature, Tensor):
            scale = self.temperature.to(device=self.x.device, dtype=dtype).reciprocal()
        else:
            scale = torch.full((), 1.0 / self.temperature, dtype=dtype, device=self.x.device)
        plan = Plan(
            self.backend,
            self.pairing,
            instances=self.instances if instance_sum else None,
            mask=self.mask,
            negatives=negatives,
            positives=positives,
            epsilon=epsilon,
            positive_sum=positive_sum,
            exchange=None if self.gather is None else self.gather.exchange,
        )
        return row_statistics(self.x, self.candidates, scale, plan)


def _layout(features: Tensor) -> tuple[Tensor, int]:
    """Rows [B * V, D] (a view wherever strides allow) and V."""
    views = features.shape[1] if features.dim() == 3 else 1
    rows = features.reshape(-1, features.shape[-1])
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


def _matches(sorted_ids: Tensor, ids: Tensor, views: int) -> Tensor:
    """How many rows bear each id."""
    right = torch.searchsorted(sorted_ids, ids, right=True)
    return (right - torch.searchsorted(sorted_ids, ids)) * views


def _pair(
    ids: Tensor,
    views: int,
    candidate_ids: Tensor | None,
    candidate_views: int,
    self_index: Tensor | None,
) -> tuple[Pairing, Tensor]:
    """Positives are the rows of the same id. Ids are per sample; returns the pairing and |P_i| per row."""
    sorted_ids, order = _sort(ids, views)
    labels = _rows_of(ids, views)
    if candidate_ids is None:
        count = _rows_of(_matches(sorted_ids, ids, views) - 1, views)
        return Pairing(labels, order, None, None, None), count
    sorted_candidates, candidate_order = _sort(candidate_ids, candidate_views)
    count = _rows_of(_matches(sorted_candidates, ids, candidate_views), views)
    if self_index is not None:
        count = count - 1
    candidate_labels = _rows_of(candidate_ids, candidate_views)
    return Pairing(labels, order, candidate_labels, candidate_order, self_index), count


def _masked(
    mask: Tensor, views: int, candidate_views: int, self_index: Tensor | None, rectangular: bool
) -> tuple[Pairing, Tensor, tiled.PositiveMask]:
    rows = _rows_of(torch.arange(mask.shape[0], device=mask.device), views)
    columns = _rows_of(torch.arange(mask.shape[1], device=mask.device), candidate_views)
    positives = tiled.PositiveMask(mask, rows, columns)
    count = tiled.positive_count(positives, self_index, symmetric=not rectangular)
    order, candidate_order = (torch.arange(len(side), device=mask.device) for side in (rows, columns))
    if not rectangular:
        return Pairing(rows, order, None, None, None), count, positives
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
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(rows.dtype)


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
    check_temperature("temperature", temperature)
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    backend = resolve_backend(backend, features.device, mask is not None)
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
    separate = candidates is not None
    if candidates is not None:
        check_features("candidates", candidates, like=features)
    if mask is not None:
        check_mask(mask, features, features if candidates is None else candidates)
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

    # Ids per sample: of the positives (classes, or samples without labels) and of the instances.
    device = features.device
    if own_instances is not None:
        sample_ids = own_instances
    elif gather is not None:
        sample_ids = gather.sample_ids(samples, device)
    else:
        sample_ids = torch.arange(samples, device=device)
    ids = sample_ids if own_labels is None else own_labels
    other_ids = other_sample_ids = None
    if candidates is not None:
        if own_labels is not None or candidate_labels is not None:
            other_ids = _candidate_ids("labels", own_labels, candidate_labels, features, candidates)
        if need_instances or (own_labels is None and mask is None):
            other_sample_ids = _candidate_ids(
                "instances", own_instances, candidate_instances, features, candidates
            )
        other_ids = other_sample_ids if other_ids is None else other_ids

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
    if gather is not None:
        columns = [_rows_of(ids, views), _rows_of(sample_ids, views)][: 2 if need_instances else 1]
        others, all_columns, self_index = gather.rows(x.detach(), columns)
        other_ids, other_sample_ids, other_views = all_columns[0], all_columns[-1], 1

    positives = None
    if mask is not None:
        mask_views = views if others is None else other_views
        pairing, count, positives = _masked(mask, x_views, mask_views, self_index, others is not None)
    else:
        pairing, count = _pair(ids, x_views, other_ids, other_views, self_index)
    instance_pairing, instance_count = None, None
    if need_instances:
        if ids is sample_ids and positives is None:
            instance_pairing, instance_count = pairing, count
        else:
            instance_pairing, instance_count = _pair(
                sample_ids, x_views, other_sample_ids, other_views, self_index
            )
    return Problem(
        x,
        others,
        temperature,
        pairing,
        count,
        instance_pairing,
        instance_count,
        positives,
        backend,
        shape,
        gather,
    )
