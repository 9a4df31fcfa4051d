"""Several labels per sample: checks of the arguments, overlaps of label sets, counts.

Label rows are uint8 [S, C], 1 where a sample has the label. The overlap of two samples is the Jaccard index
of their sets of labels, |Y_i and Y_j| / |Y_i or Y_j|, and 0 if both are empty. It is computed tile by tile;
no matrix of all pairs is stored. Class numbers are int64 [S, L], one label for each of L levels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs.checks import check_choice, check_ids, check_number, describe, describe_no_tensor
from pysupcon.pairs.modes import is_eager
from pysupcon.pairs.ops import stats_dtype
from pysupcon.pairs.slicing import tile_slices

__all__ = [
    "LEVELS",
    "MULTI_LABEL",
    "LabelOptions",
    "ManyLabels",
    "check_label_options",
    "check_many_labels",
    "form_of_labels",
    "jaccard",
    "overlap_totals",
    "shares_labels",
]

MULTI_LABEL = ("per_label", "any", "jaccard")
"""Values of the argument ``multi_label``"""
LEVELS = "levels"
"""The form of the hierarchical loss, which takes a sequence of labels"""
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class LabelOptions(NamedTuple):
    """What a loss makes of several labels per sample."""

    multi_label: Any
    """of :data:`MULTI_LABEL`, not checked yet"""
    overlap_threshold: Any
    takes: tuple[str, ...]
    """values of ``multi_label`` that the loss takes; (:data:`LEVELS`,) for a sequence of levels"""
    loss: str
    """its name, for messages"""


class ManyLabels(NamedTuple):
    """Checked labels of the samples."""

    form: str
    """of :data:`MULTI_LABEL`, or :data:`LEVELS`"""
    own: Tensor
    """label rows or class numbers of the features' samples"""
    candidates: Tensor | None
    """the same of the candidates' samples; None: the candidates are the features"""
    threshold: Tensor
    """no dimensions: a pair whose overlap is not above it has no label in common"""

    @property
    def weighted(self) -> bool:
        """Whether the loss takes a weighted mean over positives, with n over all other rows."""
        return self.form != "any"


def form_of_labels(labels: Any, options: LabelOptions) -> Any:
    """Returns :data:`LEVELS` or ``multi_label``, not checked yet; None for one label per sample."""
    if options.takes == (LEVELS,):
        return LEVELS
    if options.multi_label != "per_label" or options.overlap_threshold != 0:
        check_label_options(options)
    return options.multi_label if isinstance(labels, Tensor) and labels.dim() == 2 else None


def check_label_options(options: LabelOptions) -> float:
    """Checks ``multi_label`` and ``overlap_threshold`` of a loss, and returns the threshold as a number.

    Raises:
        TypeError: the threshold is not a number.
        ValueError: a wrong value, or one that the loss does not take.
    """
    form, takes = options.multi_label, options.takes
    check_choice("multi_label", form, MULTI_LABEL)
    if takes in ((), (LEVELS,)):
        raise ValueError(f"{options.loss} does not take labels of shape [B, C], got multi_label={form!r}")
    if form not in takes:
        forms = " or ".join(map(repr, takes))
        raise ValueError(
            f"{options.loss} takes labels of shape [B, C] with multi_label={forms} only, got "
            f"multi_label={form!r}: pass multi_label={takes[0]!r}"
        )
    threshold = check_number("overlap_threshold", options.overlap_threshold, 0.0, 1.0)
    if threshold == 1.0:
        raise ValueError("overlap_threshold must be less than 1 (no overlap is above 1), got 1.0")
    if threshold and form == "per_label":
        raise ValueError(
            "overlap_threshold goes with multi_label='any' or 'jaccard', got multi_label='per_label' and "
            f"overlap_threshold={threshold:g}"
        )
    return threshold


def check_many_labels(
    options: LabelOptions,
    form: Any,
    labels: Any,
    candidate_labels: Any,
    features: Tensor,
    candidates: Tensor | None,
    gather: bool,
) -> ManyLabels:
    """Checks labels of several labels per sample.

    Args:
        options: of the loss.
        form: of :func:`form_of_labels`.
        labels: as the caller gave them, like ``candidate_labels``.
        candidate_labels: or None.
        features: [B, V, D] or [N, D].
        candidates: or None.
        gather: whether the loss gathers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: wrong dtype, shape, device or value, or a form of labels that the loss does not take.
    """
    threshold = 0.0 if form == LEVELS else check_label_options(options)
    if gather:
        raise ValueError(
            f"gather takes one integer label per sample, got labels {describe(labels)}"
            + ("" if form == LEVELS else f" (multi_label={form!r})")
        )
    check = _check_levels if form == LEVELS else _check_label_rows
    own = check("labels", labels, features, None)
    others = None
    if candidates is not None:
        if candidate_labels is None:
            raise ValueError("candidate_labels must be given when labels and candidates are")
        others = check("candidate_labels", candidate_labels, candidates, own.shape[1])
    dtype = stats_dtype(features)
    return ManyLabels(form, own, others, torch.full((), threshold, dtype=dtype, device=features.device))


def _check_label_rows(name: str, value: Any, features: Tensor, width: int | None) -> Tensor:
    count = features.shape[0]

    def contract() -> str:
        classes = "C" if width is None else f"{width}"
        return f"{name} must be bool, or integers that are 0 or 1, of shape [B, C]=[{count}, {classes}]"

    if not isinstance(value, Tensor):
        raise TypeError(f"{contract()}, got {describe_no_tensor(value)}")
    right = value.dim() == 2 and value.shape[0] == count and (width is None or value.shape[1] == width)
    if value.dtype not in _INTEGERS or not right:
        soft = " (weights of labels are not supported)" if value.is_floating_point() else ""
        raise ValueError(f"{contract()}, got {describe(value)}{soft}")
    if value.shape[1] < 2:
        raise ValueError(
            f"{contract()} with C at least 2, got {describe(value)} (one label per sample: {name} of shape "
            "[B])"
        )
    if value.device != features.device:
        raise ValueError(f"{contract()} on {features.device}, got it on {value.device}")
    if value.dtype != torch.bool and value.device.type == "cpu" and is_eager(value) and value.numel():
        low, high = torch.aminmax(value)
        if low < 0 or high > 1:
            raise ValueError(f"{contract()}, got values from {int(low)} to {int(high)}")
    return (value != 0).to(torch.uint8)


def _check_levels(name: str, value: Any, features: Tensor, levels: int | None) -> Tensor:
    number = "at least 1" if levels is None else f"{levels}"
    contract = f"{name} must be a list or tuple of integer tensors of shape [B], one per level ({number})"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{contract}, got {describe_no_tensor(value)}")
    if not value or (levels is not None and len(value) != levels):
        raise ValueError(f"{contract}, got {describe(value)}")
    return torch.stack(
        [check_ids(f"{name}[{level}]", ids, features) for level, ids in enumerate(value)], dim=1
    )


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """Numbers of labels that rows of two sets share, float32 [I, J]. Exact: all products are 0 or 1."""
    return a.to(torch.float32) @ b.to(torch.float32).T


def _above_zero(threshold: Tensor) -> bool:
    """Whether the threshold may be above 0. Only a CPU's is read."""
    readable = threshold.device.type == "cpu" and is_eager(threshold)
    return not readable or bool(threshold > 0)


def jaccard(a: Tensor, b: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the overlaps of a tile [I, J], 0 where they are not above the threshold.

    Args:
        a: label rows [I, C].
        b: label rows [J, C].
        threshold: no dimensions.
        dtype: of the result.
    """
    shared, compared = _shared(a, b), _above_zero(threshold)
    shared = shared.to(threshold.dtype if compared else dtype)  # 0.3 must not be above a threshold of 0.3
    sizes = a.sum(1, dtype=shared.dtype)[:, None] + b.sum(1, dtype=shared.dtype)
    overlap = shared / sizes.sub_(shared).clamp_(min=1.0)
    return torch.where(overlap > threshold, overlap, 0.0).to(dtype) if compared else overlap


def shares_labels(a: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """Whether the overlap of the pairs of a tile is above the threshold, bool [I, J]; as :func:`jaccard`."""
    if not _above_zero(threshold):
        return _shared(a, b) > 0
    return jaccard(a, b, threshold, threshold.dtype) > 0


def overlap_totals(
    labels: Tensor, candidate_labels: Tensor | None, threshold: Tensor, weighted: bool
) -> Tensor:
    """Adds up over the candidates of each sample, tile by tile.

    Args:
        labels: label rows [S, C].
        candidate_labels: label rows [T, C]; None: those of the samples, each one among its own candidates.
        threshold: no dimensions.
        weighted: add overlaps instead of the number of candidates whose overlap is above the threshold.

    Returns:
        [S] in the dtype of the threshold.
    """
    others = labels if candidate_labels is None else candidate_labels
    totals = threshold.new_zeros(labels.shape[0])
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        for i in (slice(*at) for at in tile_slices(labels)):
            for j in (slice(*at) for at in tile_slices(others)):
                if candidate_labels is None and j.start < i.start:
                    continue
                if weighted:
                    tile = jaccard(labels[i], others[j], threshold, threshold.dtype)
                else:
                    tile = shares_labels(labels[i], others[j], threshold)
                totals[i] += tile.sum(1)
                if candidate_labels is None and i != j:
                    totals[j] += tile.sum(0)
    return totals
