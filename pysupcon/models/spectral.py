"""Spectral normalisation of an encoder's layers (Miyato et al. 2018, arXiv 1802.05957).

An encoder with a bounded Lipschitz constant maps similar images to similar embeddings. The contrastive loss
alone is invariant to permutations within a class (Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596).
The bound applies to a layer's weight as a matrix [out_channels, rest]. A 3x3 convolution as a map of images
may exceed it up to threefold, and normalisation layers have scales of their own.

torch.nn.utils.parametrizations.spectral_norm updates its vectors in every forward pass in training mode, so
the two passes of GradCache, or several chunks of a batch, would use different weights. Here the vectors
change only in :func:`power_iteration`, once per step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

WARMUP_ITERATIONS = 15
"""Power iterations at construction."""


class SpectralNorm(nn.Module):
    """Parametrization W -> bound * W / sigma(W), sigma(W) = ||W^T u|| with the first left singular vector u.

    Args:
        weight: [out_channels, ...], used to initialise u.
        bound: largest singular value of the result, greater than 0.

    Attributes:
        u: float [out_channels], of unit length, except in an average of weights (EMA).
    """

    u: Tensor

    def __init__(self, weight: Tensor, bound: float = 1.0) -> None:
        super().__init__()
        self.bound = bound
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.iterate(weight, WARMUP_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = (weight.flatten(1).mT @ F.normalize(self.u, dim=0)).norm()
            return weight * (self.bound / sigma)

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int = 1) -> None:
        """Run power iterations towards the first left singular vector of ``weight``."""
        matrix = weight.flatten(1)
        for _ in range(times):
            self.u.copy_(F.normalize(matrix @ F.normalize(matrix.mT @ self.u, dim=0), dim=0))


def apply_spectral_norm(module: nn.Module, bound: float) -> None:
    """Register :class:`SpectralNorm` on every convolution and linear layer of ``module``, in place."""
    for layer in list(module.modules()):
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight, bound))


def power_iteration(module: nn.Module) -> None:
    """Run one power iteration for every normalised layer; called before each training step."""
    for _, layer, norm in _normalized_layers(module):
        norm.iterate(layer.parametrizations["weight"].original)  # type: ignore[index,union-attr]


def unparametrized_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``module`` with normalised weights, for the same module without parametrizations."""
    state: dict[str, Tensor] = module.state_dict()
    for name, layer, _ in _normalized_layers(module):
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.weight.")]:
            del state[key]
        state[f"{prefix}weight"] = layer.weight.detach()  # type: ignore[operator]
    return state


def _normalized_layers(module: nn.Module) -> list[tuple[str, nn.Module, SpectralNorm]]:
    return [
        (name, layer, layer.parametrizations["weight"][0])
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer, "weight")
        and isinstance(layer.parametrizations["weight"][0], SpectralNorm)
    ]
