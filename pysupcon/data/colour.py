"""Random colour transforms of batches, as in torchvision but with parameters of its own for every sample.

Calls have the form described in :mod:`pysupcon.data.geometry`. Images have the channels red, green, blue.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import ClassVar

import torch
from torch import Tensor

from pysupcon.data.geometry import uniform_between, uniform_integers

_ORDERS = torch.tensor(list(permutations(range(4))))


class ColorJitter:
    """Jitters brightness, contrast, saturation and hue in random order, with probability ``p`` per sample.

    Args:
        brightness, contrast, saturation: range [1 - value, 1 + value] of the factor.
        hue: range [-hue, hue] of the shift, in turns.
        p: probability that a sample is changed.
    """

    num_uniforms: ClassVar[int] = 6

    def __init__(
        self, brightness: float, contrast: float, saturation: float, hue: float, *, p: float = 1.0
    ) -> None:
        self.ranges = [(1 - v, 1 + v) for v in (brightness, contrast, saturation)] + [(-hue, hue)]
        self.p = p

    def make_params(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters of n samples.

        Returns:
            Whether each sample is changed [n], the order of the adjustments [n, 4], their factors [n, 4].
        """
        strengths = [uniform_between(uniforms[:, 2 + k], *limits) for k, limits in enumerate(self.ranges)]
        orders = _ORDERS[uniform_integers(uniforms[:, 1], len(_ORDERS))]
        return uniforms[:, 0] < self.p, orders, torch.stack(strengths, 1)

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        changed, orders, strengths = self.make_params(uniforms)
        result = images.clone()
        pixels = images[changed].float()  # integers at every step, as if they were uint8
        orders, strengths = orders[changed], strengths[changed].float()
        for position in range(4):
            for index, adjust in enumerate(_ADJUSTMENTS):
                rows = (orders[:, position] == index).nonzero().flatten()
                if len(rows):
                    pixels[rows] = adjust(pixels[rows], strengths[rows, index].view(-1, 1, 1, 1))
        result[changed] = pixels.to(torch.uint8)
        return result


class RandomGrayscale:
    """Converts a sample to grey, in all three channels, with probability ``p``."""

    num_uniforms: ClassVar[int] = 1

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        chosen = uniforms[:, 0] < self.p
        result = images.clone()
        result[chosen] = rgb_to_grayscale(images[chosen].float()).to(torch.uint8).expand(-1, 3, -1, -1)
        return result


def rgb_to_grayscale(pixels: Tensor) -> Tensor:
    """Luminance (ITU-R 601-2) of pixels [n, 3, H, W] in [0, 255], rounded down: [n, 1, H, W]."""
    red, green, blue = pixels.unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()[:, None]


def _blend(pixels: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    return (pixels * ratio + other * (1 - ratio)).clamp(0, 255).floor()


def _adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 255).floor()


def _adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    # A float64 sum of integers is exact, so it does not depend on the order of the additions.
    mean = rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    return _blend(pixels, mean, factor)


def _adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, rgb_to_grayscale(pixels), factor)


def _adjust_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Shifts the hue in HSV space by ``turns`` [n, 1, 1, 1]."""
    value, lowest = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = value - lowest
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    divisor = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    sixth = torch.where(value == red, (green - blue) / divisor, sixth) + 6 * turns
    channel = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    position = (sixth + channel).remainder(6)
    shifted = value - chroma * torch.minimum(position, 4 - position).clamp(0, 1)
    # rounds like torchvision's conversion from [0, 1] to uint8
    return (shifted / 255 * (256 - 1e-3)).floor()


_ADJUSTMENTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    _adjust_brightness,
    _adjust_contrast,
    _adjust_saturation,
    _adjust_hue,
]
