"""The arguments of a loss, checked: :func:`check_arguments`. Nothing here waits for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysupcon.caller import warn_caller
from pysupcon.pairs import modes
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
from pysupcon.pairs.many_labels import LabelOptions, ManyLabels, check_many_labels, form_of_labels
from pysupcon.pairs.memory import MemoryArguments, MemoryRows, check_memory
from pysupcon.pairs.normalize import unit_rows

__all__ = ["Arguments", "check_arguments", "warn_of_norms"]

_warned: set[str] = set()


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of one call of a loss. All rows have one dtype and are normalised if wanted."""

    features: Tensor
    """[B, V, D] or [N, D]"""
    candidates: Tensor | None
    """[Bc, Vc, D] or [Nc, D]; None: the features"""
    memory: MemoryRows | None
    hard_negatives: Tensor | None
    """[B, K, D]"""
    labelled: bool
    """whether labels (one per sample) define the positives"""
    instances_given: bool
    ids: Tensor
    """int64 [B], what positives have in common: labels, or instances if there are no labels"""
    instances: Tensor | None
    """int64 [B]: given, or the number of the sample; None: not needed"""
    candidate_ids: Tensor | None
    """int64 [Bc], as ``ids``"""
    candidate_instances: Tensor | None
    mask: Tensor | None
    """bool [B, Bc], positives instead of equal ids"""
    many: ManyLabels | None
    """several labels per sample, positives instead of equal ids"""
    candidate_weights: Tensor | None
    """of each candidate row"""
    anchor_weights: Tensor | None
    """of each row of the features"""
    temperature: float | Tensor
    backend: str


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


def warn_of_norms(name: str, features: Tensor) -> None:
    """Warns once if rows that are not normalised are far from unit length. Reads only tensors on a CPU.

    Args:
        name: of the loss.
        features: [..., D].
    """
    if "norms" in _warned or features.device.type != "cpu":
        return
    if not modes.is_eager(features) or torch.jit.is_tracing():
        return
    rows = features.detach()
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    if norms.numel() and not 0.5 <= (mean := float(norms.mean())) <= 2.0:
        _warned.add("norms")
        warn_caller(
            f"the rows of features have a mean norm of {mean:.3g}, and {name} does not normalise them: pass "
            f"normalize=True, or choose the temperature for such rows (this warning is shown once)"
        )


def _normalized(rows: Tensor) -> Tensor:
    return unit_rows(rows).to(rows.dtype)


def _check_positives(features: Tensor, labelled: bool, need_instances: bool) -> None:
    """Checks features of one view per sample without candidates and instances."""
    if need_instances:
        raise ValueError(
            "the loss must know which rows are views of one sample: stack the views to features [B, V, D] "
            "with V >= 2, or pass instances (one integer per row, equal for views of one sample), got "
            f"features of shape {list(features.shape)} and instances=None"
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
    if class_balance and not batch_negatives:
        raise ValueError("class_balance needs the rows of the batch as negatives, got batch_negatives=False")
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
            raise ValueError(f"{name} needs one label per sample, not labels [B, C] or several label levels")


def check_arguments(
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
    gathered: bool,
    need_instances: bool,
    label_options: LabelOptions,
) -> Arguments:
    """Checks the arguments of a loss.

    Args:
        features: and all arguments up to ``backend``: see :mod:`pysupcon.functional`.
        gathered: whether the loss gathers rows of other processes.
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
    if gathered and backend == "reference":
        raise ValueError('gather needs a streaming backend, got backend="reference"')
    if backend != "reference":
        modes.check_mode(features, gathered)
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
            label_options, form, labels, candidate_labels, features, candidates, gathered
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
    for rows in (candidates, None if bank is None else bank.rows, hard_negatives):
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
        if candidate_ids is None:  # the mask, or several labels per sample, define the positives
            candidate_ids = torch.arange(candidates.shape[0], device=features.device)
    return Arguments(
        features=features,
        candidates=candidates,
        memory=bank,
        hard_negatives=hard_negatives,
        labelled=labels is not None,
        instances_given=instances is not None,
        ids=ids,
        instances=instance_ids,
        candidate_ids=candidate_ids,
        candidate_instances=candidate_instance_ids,
        mask=mask,
        many=many,
        candidate_weights=candidate_weights,
        anchor_weights=anchor_weights,
        temperature=temperature,
        backend=backend,
    )
