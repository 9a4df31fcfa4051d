"""Several backbones with concatenated features (Chen et al. 2022, "Perfectly Balanced")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pysupcon.pairs.normalize import unit_rows


class Concatenation(nn.Module):
    """Concatenates the features of several backbones, each normalised to unit length.

    With unit length, every backbone has the same weight: the cosine of two images is the mean of their
        cosines
    in the backbones.

    Args:
        parts: the backbones.
        widths: feature dimensions of each backbone.

    Shape:
        images [B, C, S, S] -> [B, sum(widths)].
    """

    def __init__(self, parts: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.widths = list(widths)

    def forward_each(self, images: Tensor) -> list[Tensor]:
        """Unnormalised features of each backbone, [B, width] each."""
        return [part(images) for part in self.parts]

    def forward(self, images: Tensor) -> Tensor:
        return concatenate_unit_features(self.forward_each(images))


def concatenate_unit_features(features: Sequence[Tensor]) -> Tensor:
    """Normalise features [B, width] to unit length and concatenate them to [B, sum of widths]."""
    return torch.cat([unit_rows(part) for part in features], dim=1)
