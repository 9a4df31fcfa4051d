"""The losses of HobbitLong/SupContrast and tufts-ml/SupContrast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pysupcon import functional
from pysupcon.compat.arguments import check_tensor, class_ids
from pysupcon.pairs.checks import BACKENDS, check_choice, shorten
from pysupcon.pairs.modes import is_eager

__all__ = [
    "EpsSupInfoNCELoss",
    "InfoNCELoss",
    "MultiviewEpsSupInfoNCELoss",
    "MultiviewSINCERELoss",
    "SINCERELoss",
    "SupConLoss",
]


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
        check_tensor("features", features, "[bsz, n_views, ...]")
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
            check_tensor("mask", mask, "[bsz, bsz]")
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
            labels = class_ids(labels, features)
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
            class_ids(labels, embeds),
            temperature=self.temperature,
            epsilon=self.epsilon,
            backend=self.backend,
        )

    def forward(self, embeds: Tensor, labels: Tensor) -> Tensor:
        _check_embeds(embeds, "[B, D]", 2)
        return self._loss(embeds, labels)


def _check_embeds(embeds: Any, shape: str, dimensions: int) -> None:
    check_tensor("embeds", embeds, shape)
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
