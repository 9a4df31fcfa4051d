"""Random colours of whole batches: one set of parameters a sample, else torchvision's transforms.

For the form of a step see :mod:`pysupcon.data.geometry`. Images have three channels, red, green, blue.
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
    """Brightness, contrast, saturation and hue in random order, of each sample with probability ``p``.

    Args:
        brightness, contrast, saturation: the factor lies in [1 - value, 1 + value].
        hue: the shift lies in [-hue, hue] turns.
        p: share of the samples.
    """

    count: ClassVar[int] = 6

    def __init__(
        self, brightness: float, contrast: float, saturation: float, hue: float, *, p: float = 1.0
    ) -> None:
        self.ranges = [(1 - v, 1 + v) for v in (brightness, contrast, saturation)] + [(-hue, hue)]
        self.p = p

    def make_params(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a sample is changed [n], the order of the four changes [n, 4], their strengths [n, 4]."""
        strengths = [uniform_between(numbers[:, 2 + k], *limits) for k, limits in enumerate(self.ranges)]
        orders = _ORDERS[uniform_integers(numbers[:, 1], len(_ORDERS))]
        return numbers[:, 0] < self.p, orders, torch.stack(strengths, 1)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        changed, orders, strengths = self.make_params(numbers)
        result = images.clone()
        pixels = images[changed].float()  # whole numbers throughout, as if they were uint8
        orders, strengths = orders[changed], strengths[changed].float()
        for turn in range(4):
            for number, change in enumerate(_ADJUSTMENTS):
                rows = (orders[:, turn] == number).nonzero().flatten()
                if len(rows):
                    pixels[rows] = change(pixels[rows], strengths[rows, number].view(-1, 1, 1, 1))
        result[changed] = pixels.to(torch.uint8)
        return result


class RandomGrayscale:
    """Grey, in all three channels, with probability ``p``."""

    count: ClassVar[int] = 1

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        chosen = numbers[:, 0] < self.p
        result = images.clone()
        result[chosen] = rgb_to_grayscale(images[chosen].float()).to(torch.uint8).expand(-1, 3, -1, -1)
        return result


def rgb_to_grayscale(pixels: Tensor) -> Tensor:
    """Luminance (ITU-R 601-2) rounded down, [n, 1, H, W] of [n, 3, H, W] in [0, 255]."""
    red, green, blue = pixels.unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()[:, None]


def _blend(pixels: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (pixels * share + other * (1 - share)).clamp(0, 255).floor()


def _adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 255).floor()


def _adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    # in float64 the sum of whole numbers is exact, in whatever order they are added
    mean = rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    return _blend(pixels, mean, factor)


def _adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, rgb_to_grayscale(pixels), factor)


def _adjust_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turned in the hexagonal cone of hue, saturation and value."""
    value, lowest = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = value - lowest
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    divisor = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    sixth = torch.where(value == red, (green - blue) / divisor, sixth) + 6 * turns
    channel = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    place = (sixth + channel).remainder(6)
    turned = value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
    # as torchvision's conversion from [0, 1] to bytes rounds
    return (turned / 255 * (256 - 1e-3)).floor()


_ADJUSTMENTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    _adjust_brightness,
    _adjust_contrast,
    _adjust_saturation,
    _adjust_hue,
]
