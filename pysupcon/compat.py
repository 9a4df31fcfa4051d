"""Drop-in replacements for loss classes of other libraries, with their signatures and semantics.

``SupConLoss``
    for ``losses.SupConLoss`` of HobbitLong/SupContrast
``SINCERELoss``, ``MultiviewSINCERELoss``, ``InfoNCELoss``, ``EpsSupInfoNCELoss``,
    ``MultiviewEpsSupInfoNCELoss`` for the classes of ``revised_losses`` of tufts-ml/SupContrast
``MetricLearningSupConLoss``
    for ``pytorch_metric_learning.losses.SupConLoss``

Every class takes one more keyword, ``backend`` (see :mod:`pysupcon.functional`). Labels are tensors of any
real dtype on any device. ``temperature``, ``base_temperature`` and ``epsilon`` are numbers or tensors of one
element, in the ranges of :mod:`pysupcon.functional`; a temperature that is a parameter gets its gradient.

>>> import torch
>>> from pysupcon.compat import SupConLoss
>>> features = torch.eye(2)[:, None].expand(2, 2, 2)  # [bsz, n_views, D]
>>> SupConLoss(temperature=1.0, base_temperature=1.0)(features, torch.tensor([0, 1]))
tensor(0.5514)

Intended differences, all classes
    Memory and time. Sums are taken in float32 at least, also for half-precision input and under autocast, and
    the loss is float32 at least. Features that are not finite are an error on a CPU. A batch in which no
    anchor has a positive warns on a CPU. Second derivatives raise an error.
``SupConLoss``
    An anchor without a positive counts as 0 in the mean over all anchors, as in that repository now; older
    copies give NaN there, or add 1e-9 inside the logarithm. ``mask`` must hold zeros and ones (on a CPU it is
    checked), not weights.
``SINCERELoss`` and the other classes of tufts-ml/SupContrast
    An anchor without a positive is left out of the mean; in the original it makes the whole loss NaN.
    ``InfoNCELoss`` accepts embeddings on any device.
``MetricLearningSupConLoss``
    ``indices_tuple`` (miners), another ``distance`` or ``reducer`` than the default ones, embedding
    regularisers and records are refused with an error. The mean is over the anchors that have a
    positive; the original also leaves out anchors whose loss rounds to 0, so that in a converged batch its
    mean is over fewer anchors. ``ref_emb`` with the same object as ``labels`` and ``ref_labels`` is refused,
    because the original then silently drops each row's own index: pass ``labels.clone()`` if the references
    are not the embeddings. A batch with a single positive and a single negative pair has a loss; in the
    original it is 0. No epsilon is added to the number of positives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pysupcon import functional
from pysupcon.pairs.checks import BACKENDS, check_choice, describe, shorten
from pysupcon.pairs.modes import is_eager
from pysupcon.pairs.pairing import count_matches

__all__ = [
    "EpsSupInfoNCELoss",
    "InfoNCELoss",
    "MetricLearningSupConLoss",
    "MultiviewEpsSupInfoNCELoss",
    "MultiviewSINCERELoss",
    "SINCERELoss",
    "SupConLoss",
]


def _check_tensor(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {describe(value)}")


def _labels(value: Any, like: Tensor, name: str = "labels") -> Tensor:
    """Labels of any real dtype, shape and device -> float or int64 [N] on the device of ``like``."""
    _check_tensor(name, value, "[N]")
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {describe(value)}")
    flat: Tensor = value.reshape(-1).to(like.device)
    return flat.contiguous() if flat.is_floating_point() else flat.long().contiguous()


def _class_ids(labels: Any, like: Tensor) -> Tensor:
    """Labels -> int64 [N]: equal labels, equal numbers."""
    flat = _labels(labels, like)
    return torch.unique(flat, return_inverse=True)[1] if flat.is_floating_point() else flat


def _class_ids_of_both(labels: Any, ref_labels: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids for both sides, which may be floats on one side and integers on the other."""
    first, second = _labels(labels, like), _labels(ref_labels, like, "ref_labels")
    ids = _class_ids(torch.cat([first, second]), like)
    return ids[: len(first)], ids[len(first) :]


class SupConLoss(nn.Module):
    """HobbitLong/SupContrast: ``SupConLoss(temperature, contrast_mode, base_temperature)``.

    ``features`` [bsz, n_views, ...] (what follows the views is flattened), ``labels`` [bsz] or [bsz, 1] of
    any dtype, or ``mask`` [bsz, bsz] of zeros and ones, possibly asymmetric. Returns the loss times
    temperature / base_temperature, averaged over all anchors; an anchor without a positive counts
    as 0.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        _check_tensor("features", features, "[bsz, n_views, ...]")
        if features.dim() < 3:
            raise ValueError(
                "`features` needs to be [bsz, n_views, ...], at least 3 dimensions are required, "
                f"got shape {list(features.shape)}"
            )
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"Unknown mode: {shorten(str(self.contrast_mode))}")
        samples, views = features.shape[:2]
        if mask is not None:
            _check_tensor("mask", mask, "[bsz, bsz]")
            mask = mask.to(features.device)
            if (
                mask.device.type == "cpu"
                and is_eager(mask)
                and mask.dtype != torch.bool
                and not ((mask == 0) | (mask == 1)).all()
            ):
                raise ValueError("mask must hold zeros and ones only: weighted positives are not supported")
            mask = mask != 0
        elif labels is None:
            labels = torch.arange(samples, device=features.device)
        else:
            labels = _class_ids(labels, features)
            if labels.shape[0] != samples:
                raise ValueError(
                    f"Num of labels does not match num of features: got {labels.shape[0]} and {samples}"
                )
        total = functional.supcon(
            features.flatten(start_dim=2),
            labels,
            mask,
            temperature=self.temperature,
            contrast_mode=self.contrast_mode,
            base_temperature=self.base_temperature,
            reduction="sum",
            backend=self.backend,
        )
        anchors = samples * (views if self.contrast_mode == "all" else 1)
        return total / max(anchors, 1)


class SINCERELoss(nn.Module):
    """tufts-ml/SupContrast: ``SINCERELoss(temperature)``; ``embeds`` [B, D], ``labels`` [B]."""

    epsilon = 0.0

    def __init__(self, temperature: float = 0.07, *, backend: str = "auto") -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.temperature = temperature
        self.backend = backend

    def _loss(self, embeds: Tensor, labels: Tensor) -> Tensor:
        return functional.sincere(
            embeds,
            _class_ids(labels, embeds),
            temperature=self.temperature,
            epsilon=self.epsilon,
            backend=self.backend,
        )

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        _check_embeds(embeds, "[B, D]", 2)
        return self._loss(embeds, labels)


def _check_embeds(embeds: Any, shape: str, dimensions: int) -> None:
    _check_tensor("embeds", embeds, shape)
    if embeds.dim() != dimensions:
        raise ValueError(f"embeds must be of shape {shape}, got {list(embeds.shape)}")


def _check_views(embeds: Any) -> None:
    _check_embeds(embeds, "[B, V, D]", 3)


class MultiviewSINCERELoss(SINCERELoss):
    """tufts-ml/SupContrast: ``MultiviewSINCERELoss(temperature)``; ``embeds`` [B, V, D], ``labels`` [B]."""

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        _check_views(embeds)
        return self._loss(embeds, labels)


class InfoNCELoss(SINCERELoss):
    """tufts-ml/SupContrast: ``InfoNCELoss(temperature)``; ``embeds`` [B, V, D]. SINCERE whose classes are the
    samples."""

    def forward(self, embeds: Tensor) -> Tensor:  # type: ignore[override]
        _check_views(embeds)
        return self._loss(embeds, torch.arange(embeds.shape[0], device=embeds.device))


class EpsSupInfoNCELoss(SINCERELoss):
    """tufts-ml/SupContrast: ``EpsSupInfoNCELoss(temperature, epsilon)``; ``embeds`` [B, D], ``labels``
    [B]."""

    def __init__(self, temperature: float = 0.07, epsilon: float = 0.25, *, backend: str = "auto") -> None:
        super().__init__(temperature, backend=backend)
        self.epsilon = epsilon


class MultiviewEpsSupInfoNCELoss(EpsSupInfoNCELoss):
    """tufts-ml/SupContrast: ``MultiviewEpsSupInfoNCELoss(temperature, epsilon)``; ``embeds`` [B, V, D]."""

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        _check_views(embeds)
        return self._loss(embeds, labels)


# Attributes of CosineSimilarity() and AvgNonZeroReducer(), the defaults of the original.
_DISTANCE = {"normalize_embeddings": True, "p": 2, "power": 1, "is_inverted": True, "collect_stats": False}
_REDUCER = {"low": 0, "high": None, "collect_stats": False}


def _check_default(name: str, value: Any, default: str, attributes: dict[str, Any]) -> None:
    """``value`` must be None or an object like pytorch-metric-learning's ``default``. The check
    compares the class name and attributes, so the package need not be installed."""
    if value is None:
        return
    got = describe(value) if type(value).__name__ != default else None
    for key, wanted in attributes.items():
        if got is None and not hasattr(value, key):
            got = f"a {default} without {key}"
        elif got is None and getattr(value, key) != wanted:
            got = f"{default} with {key}={shorten(repr(getattr(value, key)))}"
    if got is not None:
        raise NotImplementedError(f"{name} must be the default of SupConLoss, {default}(), got {got}")


class MetricLearningSupConLoss(nn.Module):
    """pytorch-metric-learning: ``SupConLoss(temperature)`` with its default distance and reducer.

    ``embeddings`` [N, D] are L2-normalised, ``labels`` [N]; ``ref_emb`` [M, D] with ``ref_labels`` [M] are
    contrasted with the embeddings instead of the embeddings themselves.

    The mean is over the anchors that have a positive; a batch without any positive or without any negative
    pair gives 0. In the original the mean is over the anchors whose loss is above 0 after rounding, which is
    the same in exact arithmetic: only an anchor whose single candidate is its positive has loss 0.

    The other keywords of the original are accepted only with their default values: ``distance`` None or
    ``CosineSimilarity()``, ``reducer`` None or ``AvgNonZeroReducer()``, ``embedding_regularizer`` None (with
    any ``embedding_reg_weight``, which then has no effect), ``collect_stats`` None or False. Anything else
    is a NotImplementedError.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        backend: str = "auto",
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        _check_default("distance", distance, "CosineSimilarity", _DISTANCE)
        _check_default("reducer", reducer, "AvgNonZeroReducer", _REDUCER)
        for name, value in (
            ("embedding_regularizer", embedding_regularizer),
            ("collect_stats", collect_stats),
        ):
            if value is not None and value is not False:
                raise NotImplementedError(f"{name} is not supported, got {describe(value)}")
        check_choice("backend", backend, BACKENDS)
        self.temperature = temperature
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if indices_tuple is not None:
            raise NotImplementedError(
                "indices_tuple (pairs chosen by a miner) is not supported: positives come from labels"
            )
        if labels is None:
            raise ValueError(
                "labels must be given: indices_tuple, the other source of pairs, is not supported"
            )
        _check_tensor("embeddings", embeddings, "[N, D]")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be of shape [N, D], got {list(embeddings.shape)}")
        if ref_emb is None or (ref_emb is embeddings and ref_labels is labels):
            ref_emb, ref_labels, labels = None, None, _class_ids(labels, embeddings)
        else:
            if ref_labels is None:
                raise ValueError("ref_labels must be given with ref_emb")
            if ref_labels is labels:
                raise NotImplementedError(
                    "ref_labels is the same object as labels: it is ambiguous whether ref_emb and embeddings "
                    "are the same rows; pass labels.clone() if they are not, and no ref_emb if they are"
                )
            labels, ref_labels = _class_ids_of_both(labels, ref_labels, embeddings)
        loss = functional.supcon(
            embeddings,
            labels,
            temperature=self.temperature,
            candidates=ref_emb,
            candidate_labels=ref_labels,
            reduction="none",
            normalize=True,
            backend=self.backend,
        )
        others, itself = (labels, 1) if ref_labels is None else (ref_labels, 0)
        count = count_matches(torch.sort(others)[0], labels) - itself
        candidates = others.numel() - itself
        valid = (count > 0) & (count < candidates).any() & (candidates > 1)
        return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
