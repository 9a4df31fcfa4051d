"""Encoders of bounded Lipschitz constant: every layer is bounded as the map that it computes.

An encoder with a bounded Lipschitz constant maps similar images to similar embeddings. The contrastive loss
alone is invariant to permutations within a class (Chen et al. 2022, "Perfectly Balanced", arXiv 2204.07596).

Bounded by ``model.lipschitz``, c:

- linear layers: the weight is divided by its largest singular value (Miyato et al. 2018, arXiv 1802.05957);
- convolutions: as maps of images of the size that they get, not as matrices [out_channels, rest], whose
  largest singular value a 3x3 convolution may exceed threefold (Ryu et al. 2019, arXiv 1905.05895; Gouk et
  al. 2021, arXiv 1804.04368);
- BatchNorm: |gamma| / sqrt(variance + eps) of each channel is at most c (bounded_batch_norm.py). Without
  this, BatchNorm undoes the scale of the convolution before it.

Not bounded: LayerNorm, GroupNorm, attention, convolutions with another padding than zeros, and layers of your
own with parameters. :func:`unbounded_layers` finds them. Residual connections add the constants of their
branches, so layers of constant c do not give the network the constant c^depth.
:func:`pysupcon.models.lipschitz.certified_bound` knows the structure of some networks.

Division by the length of the embedding would undo all bounds, too, because it is as steep as 1 / length:
see :func:`within_unit_ball`.

torch.nn.utils.parametrizations.spectral_norm updates its vectors in every forward pass in training mode, so
the two passes of GradCache, or several chunks of a batch, would use different weights. Here the vectors
change only in :func:`power_iteration`, once per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize

from pysupcon.models.bounded_batch_norm import BoundedBatchNorm, bound_batch_norm

WARMUP_ITERATIONS = 15
"""Power iterations at construction."""
_SMALLEST = 1e-12
_CONVOLUTIONS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Conv1d: (F.conv1d, F.conv_transpose1d),
    nn.Conv2d: (F.conv2d, F.conv_transpose2d),
    nn.Conv3d: (F.conv3d, F.conv_transpose3d),
}
_NORMALISING = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_MULTIPLYING = ("attention", "attn", "squeeze", "excite", "gate")
"""Parts of the names of modules that multiply features with each other."""


class MatrixMap:
    """The map x -> W x of a linear layer, W [out, in]."""

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """[in] -> [out]."""
        return weight @ x

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """[out] -> [in]."""
        return weight.mT @ y


class ConvolutionMap:
    """The map of a convolution on images of one size, padded with zeros.

    Args:
        layer: the convolution.
        size: height and width of its input (one number for Conv1d, three for Conv3d).
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: Sequence[int]) -> None:
        self._forward, self._transposed = _CONVOLUTIONS[type(layer)]
        padding = convolution_padding(layer)
        assert padding is not None, "the layer must pad with zeros"
        self.options = {
            "stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups
        }  # fmt: skip
        shape = zip(size, layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
        # The transposed convolution of a strided one does not know how many pixels the stride left out.
        self.left_out = [(n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in shape]

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """[in_channels, H, W] -> [out_channels, H', W']."""
        mapped: Tensor = self._forward(x[None], weight, **self.options)[0]
        return mapped

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """[out_channels, H', W'] -> [in_channels, H, W]."""
        mapped: Tensor = self._transposed(y[None], weight, output_padding=self.left_out, **self.options)[0]
        return mapped


class SpectralNorm(nn.Module):
    """Parametrization W -> bound * W / sigma, with sigma = ||A^T u|| for the map A of the layer.

    u is the first left singular vector of A after enough power iterations; before, sigma is smaller than the
    largest singular value.

    Args:
        weight: [out_channels, ...].
        bound: largest singular value of the result, greater than 0.
        layer_map: the map A; None means that of the matrix ``weight``.
        shape: shape of the output of A; None means [out_channels].

    Attributes:
        u: float of ``shape``, of unit length, except in an average of weights (EMA).
    """

    u: Tensor

    def __init__(
        self,
        weight: Tensor,
        bound: float = 1.0,
        layer_map: MatrixMap | ConvolutionMap | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.bound = bound
        self.map = layer_map or MatrixMap()
        start = torch.randn(shape or weight.shape[:1], dtype=weight.dtype, device=weight.device)
        self.register_buffer("u", _unit(start))
        self.iterate(weight, WARMUP_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = self.map.adjoint(weight, _unit(self.u)).norm()
            return weight * (self.bound / sigma.clamp_min(_SMALLEST))

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int = 1) -> None:
        """Run power iterations towards the first left singular vector of the map."""
        for _ in range(times):
            right = _unit(self.map.adjoint(weight, self.u))
            self.u.copy_(_unit(self.map.apply(weight, right)))


def apply_spectral_norm(module: nn.Module, bound: float, shape: Sequence[int]) -> None:
    """Bound every convolution, linear layer and BatchNorm of ``module``, in place.

    Args:
        module: maps [B, *shape] to embeddings.
        bound: largest singular value of each layer, greater than 0.
        shape: shape of an image, or of a vector; the sizes of the convolutions' inputs follow from it.
    """
    sizes = _input_sizes(module, shape)
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight, bound))
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and _is_bounded_convolution(layer):
            extent = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            size = sizes.get(layer, extent)
            layer_map = ConvolutionMap(layer, size)
            empty = layer.weight.detach().new_zeros(layer.in_channels, *size)
            out = layer_map.apply(layer.weight.detach(), empty).shape
            norm = SpectralNorm(layer.weight, bound, layer_map, out)
            parametrize.register_parametrization(layer, "weight", norm)
        elif isinstance(layer, _BatchNorm):
            bound_batch_norm(layer, bound)


def unbounded_layers(module: nn.Module) -> dict[str, int]:
    """Layers that :func:`apply_spectral_norm` does not bound: their number by type."""
    found: Counter[str] = Counter()
    for layer in module.modules():
        known = isinstance(layer, (SpectralNorm, BoundedBatchNorm, parametrize.ParametrizationList))
        if known or parametrize.is_parametrized(layer, "weight"):
            continue
        name = type(layer).__name__
        own_parameters = next(layer.parameters(recurse=False), None) is not None
        multiplies = any(part in name.lower() for part in _MULTIPLYING)
        if own_parameters or multiplies or isinstance(layer, _NORMALISING):
            found[name] += 1
    return dict(found)


def within_unit_ball(rows: Tensor) -> Tensor:
    """Divide rows [..., D] that are longer than 1 by their length; at least float32.

    The map has the Lipschitz constant 1. Division by the length is as steep as 1 / length: an encoder could
    then fulfil every bound by small embeddings, and be as steep as it likes on the sphere.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1)


def power_iteration(module: nn.Module) -> None:
    """Run one power iteration for every normalised layer; called before each training step."""
    for _, layer, norm in _normalized_layers(module):
        norm.iterate(layer.parametrizations["weight"].original)  # type: ignore[index,union-attr]


def unparametrized_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``module`` with bounded weights, for the same module without bounds, in eval mode."""
    state: dict[str, Tensor] = module.state_dict()
    for name, layer, _ in _normalized_layers(module):
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.weight.")]:
            del state[key]
        state[f"{prefix}weight"] = layer.weight.detach()  # type: ignore[operator]
    for name, layer in module.named_modules():
        if isinstance(layer, BoundedBatchNorm):
            assert layer.running_var is not None
            state[f"{name}.weight" if name else "weight"] = layer.bounded_weight(layer.running_var).detach()
    return state


def _normalized_layers(module: nn.Module) -> list[tuple[str, nn.Module, SpectralNorm]]:
    return [
        (name, layer, layer.parametrizations["weight"][0])
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer, "weight")
        and isinstance(layer.parametrizations["weight"][0], SpectralNorm)
    ]


def _is_bounded_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """A subclass may compute something else, e.g. pad its input."""
    return type(layer) in _CONVOLUTIONS and convolution_padding(layer) is not None


def convolution_padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int] | None:
    """Zeros on each side of the input; None if the layer pads otherwise."""
    if layer.padding_mode != "zeros":
        return None
    if isinstance(layer.padding, str):
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "valid":
            return [0] * len(total)
        return None if any(each % 2 for each in total) else [each // 2 for each in total]
    return list(layer.padding)


@torch.no_grad()
def _input_sizes(module: nn.Module, shape: Sequence[int]) -> dict[nn.Module, list[int]]:
    """The largest height and width that each convolution gets, by a pass over a zero image."""
    sizes: dict[nn.Module, list[int]] = {}

    def record(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        size = list(arguments[0].shape[-len(layer.kernel_size) :])  # type: ignore[arg-type]
        sizes[layer] = [max(pair) for pair in zip(size, sizes.get(layer, size), strict=True)]

    layers = [layer for layer in module.modules() if type(layer) in _CONVOLUTIONS]
    if not layers:
        return sizes
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    training = module.training
    try:
        parameter = next(module.parameters())
        module.eval()(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return sizes


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(_SMALLEST)
