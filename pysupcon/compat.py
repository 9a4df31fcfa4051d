"""The loss classes people already import, with their signatures and semantics: change the import line,
nothing else.

``SupConLoss``
    for ``losses.SupConLoss`` of HobbitLong/SupContrast
``SINCERELoss``, ``MultiviewSINCERELoss``, ``InfoNCELoss``, ``EpsSupInfoNCELoss``,
    ``MultiviewEpsSupInfoNCELoss`` for the classes of ``revised_losses`` of tufts-ml/SupContrast
``MetricLearningSupConLoss``
    for ``pytorch_metric_learning.losses.SupConLoss``

Every class takes one more keyword, ``backend`` (see :mod:`pysupcon.functional`).

Intended differences, all classes
    Memory and time. Sums are taken in float32 at least, also for half-precision input and under autocast, and
    the loss is float32 at least. Features that are not finite are an error on a CPU. A batch in which no
    anchor has a positive warns on a CPU. Second derivatives are refused, never silently wrong.
``SupConLoss``
    An anchor without a positive counts as 0 in the mean over all anchors, as in that repository now; older
    copies give NaN there, or add 1e-9 inside the logarithm. ``mask`` must hold zeros and ones (on a CPU it is
    checked), not weights.
``SINCERELoss`` and its kin
    An anchor without a positive is left out of the mean; there it makes the whole loss NaN.
    ``InfoNCELoss`` accepts embeddings on any device.
``MetricLearningSupConLoss``
    ``indices_tuple`` (miners), ``distance``, ``reducer``, embedding regularisers and records are refused with
    an error. ``ref_emb`` with the very same ``labels`` object as ``ref_labels`` is refused, because there it
    silently drops each row's own index: pass ``labels.clone()`` for references that are not the rows
    themselves. A batch with a single positive and a single negative pair has a loss; there it is 0. No
    epsilon is added to the number of positives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._checks import BACKENDS, check_choice
from ._modes import runs_plainly

__all__ = [
    "EpsSupInfoNCELoss",
    "InfoNCELoss",
    "MetricLearningSupConLoss",
    "MultiviewEpsSupInfoNCELoss",
    "MultiviewSINCERELoss",
    "SINCERELoss",
    "SupConLoss",
]


def _class_ids(labels: Tensor, like: Tensor) -> Tensor:
    """Labels of any dtype, shape and device -> one integer per sample, on the device of ``like``."""
    labels = labels.reshape(-1).to(like.device)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return torch.unique(labels, return_inverse=True)[1]
    return labels


class SupConLoss(nn.Module):
    """HobbitLong/SupContrast: ``SupConLoss(temperature, contrast_mode, base_temperature)``.

    ``features`` [bsz, n_views, ...] (what follows the views is flattened), ``labels`` [bsz] or [bsz, 1] of
    any dtype, or ``mask`` [bsz, bsz] of zeros and ones, possibly asymmetric. Returns the loss times
    temperature / base_temperature, averaged over all anchors; one without a positive counts as 0.
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
        if features.dim() < 3:
            raise ValueError(
                "`features` needs to be [bsz, n_views, ...], at least 3 dimensions are required, "
                f"got shape {list(features.shape)}"
            )
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"Unknown mode: {self.contrast_mode}")
        samples, views = features.shape[:2]
        if mask is not None:
            mask = mask.to(features.device)
            if (
                mask.device.type == "cpu"
                and runs_plainly(mask)
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

    def _loss(self, embeds: Tensor, labels: Tensor | None) -> Tensor:
        return functional.sincere(
            embeds,
            None if labels is None else _class_ids(labels, embeds),
            temperature=self.temperature,
            epsilon=self.epsilon,
            backend=self.backend,
        )

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        if embeds.dim() != 2:
            raise ValueError(f"embeds must be of shape [B, D], got {list(embeds.shape)}")
        return self._loss(embeds, labels)


def _check_views(embeds: Tensor) -> None:
    if embeds.dim() != 3:
        raise ValueError(f"embeds must be of shape [B, V, D], got {list(embeds.shape)}")


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


class MetricLearningSupConLoss(nn.Module):
    """pytorch-metric-learning: ``SupConLoss(temperature)`` with its default distance and reducer.

    ``embeddings`` [N, D] are L2-normalised, ``labels`` [N]; ``ref_emb`` [M, D] with ``ref_labels`` [M] are
    what to contrast with instead of the embeddings. The mean is over the anchors whose loss is greater than
    0; a batch without any positive or without any negative pair gives 0.
    """

    def __init__(self, temperature: float = 0.1, *, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__()
        if kwargs:
            raise NotImplementedError(
                "MetricLearningSupConLoss supports temperature only (cosine similarity, mean over non-zero "
                f"losses), got {', '.join(sorted(kwargs))}"
            )
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
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be of shape [N, D], got {list(embeddings.shape)}")
        if ref_emb is None or (ref_emb is embeddings and ref_labels is labels):
            ref_emb, ref_labels, labels = None, None, _class_ids(labels, embeddings)
        else:
            if ref_labels is None:
                raise ValueError("ref_labels must be given with ref_emb")
            if ref_labels is labels:
                raise NotImplementedError(
                    "ref_labels is the same object as labels: whether row i of ref_emb is row i of "
                    "embeddings cannot be told; pass labels.clone() if it is not, and no ref_emb if it is"
                )
            # One numbering for both sides, whatever the labels' dtype.
            both = torch.cat([labels.reshape(-1), ref_labels.reshape(-1).to(labels.device)])
            ids = _class_ids(both, embeddings)
            labels, ref_labels = ids[: labels.numel()], ids[labels.numel() :]
        stats = functional.pair_statistics(
            embeddings,
            labels,
            temperature=self.temperature,
            candidates=ref_emb,
            candidate_labels=ref_labels,
            normalize=True,
            backend=self.backend,
        )
        n, p, mean, count = stats
        positive = torch.where(count > 0, p, 0.0)
        loss = torch.where(count > 0, torch.logaddexp(n, positive) - mean, 0.0)
        # Rounding must not make a loss of 0 (one positive, no negative) count.
        valid = (loss > 0) & ((n > -torch.inf) | (count > 1))
        valid &= (count > 0).any() & (n > -torch.inf).any()
        total = torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
        return total.to(torch.promote_types(embeddings.dtype, torch.float32))
