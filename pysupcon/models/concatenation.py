"""Several backbones side by side, their features concatenated (Chen et al. 2022, "Perfectly Balanced")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pysupcon.pairs.unit import unit_rows


class Concatenation(nn.Module):
    """The features of each backbone, of unit length each, one after another.

    Unit length, so that each has the same say in a cosine or a distance, whatever the scale it was trained
    to: the cosine of two images is the mean of their cosines in each backbone.

    Args:
        parts: backbones.
        widths: dimensions of their features.

    Shape:
        images [B, C, S, S] -> [B, sum(widths)].
    """

    def __init__(self, parts: Sequence[nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.widths = list(widths)

    def forward_each(self, images: Tensor) -> list[Tensor]:
        """Features of each backbone as they come, [B, width]."""
        return [part(images) for part in self.parts]

    def forward(self, images: Tensor) -> Tensor:
        return concatenate_unit_features(self.forward_each(images))


def concatenate_unit_features(features: Sequence[Tensor]) -> Tensor:
    """Features [B, width] each -> [B, all widths], each part of unit length."""
    return torch.cat([unit_rows(part) for part in features], dim=1)
