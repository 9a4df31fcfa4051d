"""Lipschitz constants of encoders: a certified bound, and local constants that are measured.

All constants are in the Euclidean norm of the encoder's input, which is normalised as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pysupcon.models.backbones import MLP, SmallCNN
from pysupcon.models.bounded_batch_norm import BoundedBatchNorm
from pysupcon.models.spectral import convolution_padding
from pysupcon.pairs.normalize import unit_rows

_ONE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Flatten, nn.Dropout, nn.Dropout2d
)  # fmt: skip
"""Layers of Lipschitz constant 1 in eval mode."""
_TOLERANCE = 1e-4
"""Relative change of a singular value at which the power iteration ends."""


def certified_bound(module: nn.Module, shape: Sequence[int]) -> float | None:
    """An upper bound of the Lipschitz constant of ``module`` in eval mode: the product over its layers.

    Args:
        module: maps [B, *shape] to embeddings [B, D], which are not of unit length: the constant of the
            embedding of unit length, at an image, is at most this bound divided by the embedding's length.
        shape: shape of an image, or of a vector.

    Returns:
        The bound; None if the structure of the network is not known. Known are small_cnn, mlp, and
        ``nn.Sequential`` of convolutions, linear layers, BatchNorm, pooling, and activations whose slope is
        at most 1.
    """
    parameter = next(module.parameters(), None)
    x = torch.zeros(1, *shape) if parameter is None else parameter.detach().new_zeros(1, *shape)
    bound = 1.0
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for layer in _sequence(module):
                constant = _constant(layer, x)
                if constant is None:
                    return None
                bound *= constant
                x = layer(x)
    finally:
        module.train(training)
    return bound


def local_constants(
    encode: Callable[[Tensor], Tensor], images: Tensor, *, unit: bool = True, iterations: int = 200
) -> Tensor:
    """The local Lipschitz constant at each image: the largest singular value of the Jacobian.

    It is found by power iteration, for all images at once, which ends when no value changes by more than
    1e-4 of itself. An unfinished iteration gives a value that is too small.

    Args:
        encode: maps images [B, ...] to embeddings [B, D], each image by itself: in eval mode.
        images: [B, ...].
        unit: of the embedding of unit length; false: of the embedding itself.
        iterations: largest number of power iterations.

    Returns:
        [B], at least 0.
    """

    def function(x: Tensor) -> Tensor:
        return unit_rows(encode(x)) if unit else encode(x)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    direction = _unit(start.to(images.device, images.dtype))
    values = images.new_zeros(len(images))
    # Only the plain attention kernel has forward-mode derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        transposed = torch.func.vjp(function, images)[1]
        for _ in range(iterations):
            image = torch.func.jvp(function, (images,), (direction,))[1]
            before, values = values, image.detach().norm(dim=1)
            direction = _unit(transposed(image)[0].detach())
            if bool(((values - before).abs() <= _TOLERANCE * values).all()):
                break
    return values


def convolution_norm(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: Sequence[int]) -> float:
    """An upper bound of the largest singular value of a convolution on images of one size.

    A convolution that pads with zeros is a part of the rows and columns of the circular one on a torus that
    is larger by the padding. Its singular values are those of the matrices [out_channels, in_channels] of
    all frequencies (Sedghi et al. 2019, arXiv 1805.10408).

    Args:
        layer: pads with zeros.
        size: height and width of its input.
    """
    padding = convolution_padding(layer)
    assert padding is not None, "the layer must pad with zeros"
    weight = layer.weight.detach().double()
    for dim, step in enumerate(layer.dilation, 2):
        spread = weight.new_zeros(
            *weight.shape[:dim], step * (weight.shape[dim] - 1) + 1, *weight.shape[dim + 1 :]
        )
        spread[(slice(None),) * dim + (slice(None, None, step),)] = weight
        weight = spread
    torus = [max(n + p, k) for n, p, k in zip(size, padding, weight.shape[2:], strict=True)]
    kernel = weight.unflatten(0, (layer.groups, -1))  # [groups, out / groups, in / groups, k...]
    dims = tuple(range(3, kernel.dim()))
    frequencies = torch.fft.rfftn(kernel, s=torus, dim=dims).flatten(3).permute(3, 0, 1, 2)
    return max(float(torch.linalg.matrix_norm(part, 2).max()) for part in frequencies.split(64))


class _GlobalMean(nn.Module):
    """Mean over height and width: [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _sequence(module: nn.Module) -> list[nn.Module]:
    """The layers of a network in order."""
    if isinstance(module, SmallCNN):
        return [*_flat(module.features), _GlobalMean()]
    if isinstance(module, MLP):
        return list(_flat(module.layers))
    return list(_flat(module)) if type(module) is nn.Sequential else [module]


def _flat(sequence: nn.Module) -> Iterator[nn.Module]:
    for layer in sequence.children():
        if type(layer) is nn.Sequential:
            yield from _flat(layer)
        else:
            yield layer


def _constant(layer: nn.Module, x: Tensor) -> float | None:
    """Upper bound of the Lipschitz constant of a layer in eval mode on inputs like ``x``; None: not known."""
    if isinstance(layer, _ONE):
        return 1.0
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope))
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and convolution_padding(layer) is not None:
        return convolution_norm(layer, x.shape[2:])
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return _batch_norm_scale(layer)
    if isinstance(layer, nn.MaxPool2d) and layer.dilation in (1, (1, 1)):
        return prod(ceil(k / s) for k, s in zip(*_sizes(layer), strict=True)) ** 0.5  # windows of one pixel
    if isinstance(layer, nn.AvgPool2d) and _is_plain(layer):
        return prod(ceil(k / s) / k for k, s in zip(*_sizes(layer), strict=True)) ** 0.5
    if isinstance(layer, _GlobalMean) or (
        isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    ):
        return float(prod(x.shape[2:])) ** -0.5
    return None


def _batch_norm_scale(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> float | None:
    """Largest scale of a channel in eval mode; None without running statistics."""
    if layer.running_var is None:
        return None
    weight: Tensor | None = layer.weight
    if isinstance(layer, BoundedBatchNorm):
        weight = layer.bounded_weight(layer.running_var)
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    return float((scale if weight is None else weight.detach().double().abs() * scale).max())


def _is_plain(layer: nn.AvgPool2d) -> bool:
    """Whether each window is divided by its number of pixels."""
    return layer.divisor_override is None and not layer.ceil_mode and layer.padding in (0, (0, 0))


def _sizes(layer: nn.MaxPool2d | nn.AvgPool2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride."""
    kernel, stride = (
        each if isinstance(each, tuple) else (each, each) for each in (layer.kernel_size, layer.stride)
    )
    return kernel, stride


def _unit(rows: Tensor) -> Tensor:
    """Divide each row [B, ...] by its length; rows of length 0 stay 0."""
    length = rows.flatten(1).norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows / length.view(-1, *[1] * (rows.dim() - 1))
