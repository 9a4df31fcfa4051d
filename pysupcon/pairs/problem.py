"""From the arguments of a loss to a :class:`Problem`: rows, positives and their counts, backend.

:func:`pysupcon.contrastive.build_problem` calls :func:`prepare` once per loss. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysupcon.pairs import modes, ops, tiled
from pysupcon.pairs.agreement import SharedArguments
from pysupcon.pairs.autograd import row_statistics
from pysupcon.pairs.backends import check_kernels, resolve_backend
from pysupcon.pairs.checks import (
    check_choice,
    check_features,
    check_ids,
    check_mask,
    check_temperature,
)
from pysupcon.pairs.global_batch import Gather, GlobalBatch, build_global_batch
from pysupcon.pairs.many_labels import LabelOptions, check_many_labels, form_of_labels
from pysupcon.pairs.normalize import unit_rows
from pysupcon.pairs.pairing import (
    InstanceIds,
    add_instances,
    number_by_label,
    pair_apart,
    pair_by_id,
    pair_by_mask,
    pair_by_overlap,
    weigh_positives,
)
from pysupcon.pairs.positive_means import PositiveWeights, positive_means
from pysupcon.pairs.statistics import Pairing, Plan, RowStatistics

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
    count: Tensor
    """|P_i|, int64 [M]; with ``weights`` [L, M], 0 for an anchor without a loss"""
    instance_count: Tensor | None
    """|A_i|, int64 [M]"""
    mask: tiled.PositiveMask | None
    backend: str
    shape: tuple[int, ...]
    """of the losses with ``reduction="none"``: [B, V], [B] or [N]"""
    global_batch: GlobalBatch | None
    """None: the candidates are rows of this process only"""
    weights: PositiveWeights | None = None
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
        self, *, negatives: bool = False, positives: bool = False, epsilon: float | None = None
    ) -> RowStatistics:
        """Computes the statistics of every anchor, differentiable once.

        Args:
            negatives: compute n.
            positives: compute p and the sums over positives.
            epsilon: compute the softplus sum with this epsilon, which needs ``negatives``; None: do not.

        Returns:
            The requested statistics; the values of the others are undefined.
        """
        positives = positives and self.weights is None
        plan = Plan(self.backend, self.pairing, self.mask, negatives, positives, epsilon)
        statistics = row_statistics(self.x, self.candidates, self.scale, plan)
        return statistics if self.pairing.instances is not None else statistics.without_instances()

    def positive_means(self) -> Tensor:
        """Computes the weighted means of s over positives, [L, M]; only with ``weights``."""
        assert self.weights is not None
        return positive_means(self.x, self.candidates, self.scale, self.weights)


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
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both define the positives: give only one of them")
    if candidates is None and (candidate_labels is not None or candidate_instances is not None):
        raise ValueError("candidate_labels and candidate_instances need candidates")
    if gather is not None and backend == "reference":
        raise ValueError('gather needs a streaming backend, got backend="reference"')
    if backend != "reference":
        modes.check_mode(features, gather is not None)
    if candidates is not None:
        check_features("candidates", candidates, like=features)
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
    if candidates is None and instances is None and (features.dim() == 2 or features.shape[1] == 1):
        _check_positives(features, labels is not None or related, need_instances)

    if normalize:
        features = _normalized(features)
        candidates = None if candidates is None else _normalized(candidates)
    if candidates is not None and candidates.dtype != features.dtype:
        dtype = torch.promote_types(candidates.dtype, features.dtype)
        features, candidates = features.to(dtype), candidates.to(dtype)
    if many is not None and many.weighted:  # the two parts of a gradient are added before they are rounded
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        candidates = None if candidates is None else candidates.to(features.dtype)
    if backend == "cuda":
        backend = check_kernels(requested, features.device, features.dtype)

    # Ids per sample: of the instances, and of the positives (labels, or instances if there are no labels).
    instance_ids = instances
    if instance_ids is None and (need_instances or labels is None):
        instance_ids = torch.arange(features.shape[0], device=features.device)
    ids = instance_ids if labels is None else labels
    assert ids is not None
    candidate_ids = candidate_instance_ids = None
    if candidates is not None:
        if labels is not None or candidate_labels is not None:
            candidate_ids = _candidate_ids("labels", labels, candidate_labels, features, candidates)
        if need_instances or (labels is None and not related):
            candidate_instance_ids = _candidate_ids(
                "instances", instances, candidate_instances, features, candidates
            )
        candidate_ids = candidate_instance_ids if candidate_ids is None else candidate_ids

    global_batch = None
    if gather is not None:
        communicator = gather.begin(features, temperature)
        if candidates is not None or mask is not None or contrast_mode != "all":  # on every process
            raise ValueError(
                'gather works with features and labels only: no candidates, no mask, contrast_mode="all"'
            )
        if communicator is not None:
            global_batch = build_global_batch(communicator, features, labels, instances, need_instances)

    # Rows: the anchors, the candidates, and the candidate that is the anchor itself.
    x, views = _flatten_views(features)
    self_index, shape = None, tuple(features.shape[:-1])
    candidate_rows, candidate_views = (None, 1) if candidates is None else _flatten_views(candidates)
    if contrast_mode == "one" and views > 1:
        if candidate_rows is None:
            candidate_rows, candidate_views = x, views
            candidate_ids, candidate_instance_ids = ids, instance_ids
            self_index = torch.arange(features.shape[0], device=features.device) * views
        x, views, shape = x[::views], 1, (features.shape[0],)
    positives = weights = None
    column_views = views if candidate_rows is None else candidate_views
    if many is not None and candidate_rows is not None and many.candidates is None:
        many = many._replace(candidates=many.own)
    if many is not None and many.weighted:
        columns = None if candidate_rows is None else candidate_rows.shape[0]
        pairing = pair_apart(x.shape[0], columns, self_index, x)
        weights, count = weigh_positives(many, views, column_views, self_index)
    elif many is not None:
        pairing, count, positives = pair_by_overlap(
            many, views, column_views, self_index, rectangular=candidate_rows is not None
        )
    elif mask is not None:
        pairing, count, positives = pair_by_mask(
            mask, views, column_views, self_index, rectangular=candidate_rows is not None
        )
    else:
        pairing, count = pair_by_id(ids, views, candidate_ids, candidate_views, self_index)
    instance_count = None
    if need_instances and ids is instance_ids and positives is None:
        instance_count = count  # A_i is P_i
    elif need_instances:
        assert instance_ids is not None
        # With a mask, rows are not sorted by label and instance.
        given = instances is not None and positives is None
        paired = InstanceIds(instance_ids, candidate_instance_ids, given)
        if given:
            paired = number_by_label(ids, None if candidate_ids is ids else candidate_ids, paired)
        pairing, instance_count = add_instances(pairing, views, candidate_views, paired)
    return Problem(
        x,
        candidate_rows,
        temperature,
        pairing,
        count,
        instance_count,
        positives,
        backend,
        shape,
        global_batch,
        weights,
    )
