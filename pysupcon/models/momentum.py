"""The key encoder of MoCo: a moving average of the trained encoder (He et al. 2020, arXiv 1911.05722)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pysupcon.models.model import ContrastiveModel
from pysupcon.models.spectral import power_iteration


class MomentumEncoder(nn.Module):
    """Encodes keys with weights that are an exponential moving average of a model's weights.

    As in MoCo, it is in training mode: BatchNorm normalises with the statistics of the batch of keys. The
    batch is not shuffled over the processes, and the running statistics are not averaged. They are not used.

    Args:
        model: the trained model; copied.
        momentum: weight of the old average in each update, from 0 to 1.
    """

    def __init__(self, model: ContrastiveModel, momentum: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the weights towards those of ``model``; called after each optimizer step."""
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - self.momentum)
        power_iteration(self.model)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns the projections [B, D] of images [B, C, S, S]: the keys."""
        keys: Tensor = self.model.project(images)
        return keys
