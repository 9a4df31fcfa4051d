"""Random geometry of whole batches: one set of parameters a sample, else torchvision's transforms.

Every step takes uint8 images [n, C, H, W] and ``count`` uniform numbers a sample, float64 [n, count], and
gives uint8 images. A sample's result depends on its own numbers alone, not on the batch around it. Parameters
are distributed and pixels computed as by the torchvision.transforms.v2 class of the same name; the tests
compare the two.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2 import functional


def uniform_between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniform numbers of [0, 1) brought to [low, high)."""
    return low + (high - low) * uniform


def uniform_integers(uniform: Tensor, bound: int | Tensor) -> Tensor:
    """Whole numbers in [0, bound), all as probable, from uniform ones; int64."""
    return (uniform * bound).long()


class RandomAffine:
    """Rotation, shift by whole pixels and shear along x, about the middle, bilinear, black outside.

    Args:
        degrees: the angle lies in [-degrees, degrees].
        translate: the shift lies in [-translate, translate] times the side, of each axis.
        shear: the angle of the shear lies in [-shear, shear] degrees.
    """

    count: ClassVar[int] = 4

    def __init__(self, degrees: float, translate: float = 0.0, shear: float = 0.0) -> None:
        self.degrees, self.translate, self.shear = degrees, translate, shear

    def make_params(self, numbers: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Angles [n] and shears [n] in degrees, shifts (x, y) [n, 2] in pixels."""
        sides = torch.tensor([width, height], dtype=torch.float64)
        shift = uniform_between(numbers[:, 1:3], -self.translate, self.translate) * sides
        return (
            uniform_between(numbers[:, 0], -self.degrees, self.degrees),
            uniform_between(numbers[:, 3], -self.shear, self.shear),
            shift.round(),
        )

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        angle, shear, shift = self.make_params(numbers, height, width)
        cos, sin, tan = (each[:, None, None] for each in (*_cos_sin(angle), torch.deg2rad(shear).tan()))
        # The inverse of rotation times shear, from the pixel that is asked for to where it comes from.
        x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) - shift[:, 0, None, None]
        y = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None] - shift[:, 1, None, None]
        from_x = (cos - sin * tan) * x + (sin + cos * tan) * y
        from_y = cos * y - sin * x
        grid = torch.stack([from_x / (width / 2), from_y / (height / 2)], dim=-1).float()
        # What lies outside is blended in by the share of the image in each pixel, as torchvision does.
        inside = images.new_ones(len(images), 1, height, width)
        sampled = grid_sample(torch.cat([images, inside], 1).float(), grid, align_corners=False)
        return (sampled[:, :-1] * sampled[:, -1:]).round_().to(torch.uint8)


def _cos_sin(degrees: Tensor) -> tuple[Tensor, Tensor]:
    radians = torch.deg2rad(degrees)
    return radians.cos(), radians.sin()


class RandomCrop:
    """A window of the image's own size, after ``padding`` black pixels were put on every side."""

    count: ClassVar[int] = 2

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def make_params(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Top and left of the windows in the padded image, int64 [n] each."""
        corners = uniform_integers(numbers[:, :2], 2 * self.padding + 1)
        return corners[:, 0], corners[:, 1]

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left = self.make_params(numbers)
        rows = (top[:, None] + torch.arange(height))[:, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, :]
        source = (rows * (width + 2 * self.padding) + columns).flatten(1)[:, None]
        padded = pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, source.expand(-1, images.shape[1], -1)).view(images.shape)


class RandomHorizontalFlip:
    """Mirrored left to right with probability one half."""

    count: ClassVar[int] = 1

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        flipped = images.clone()
        mirror = numbers[:, 0] < 0.5
        flipped[mirror] = images[mirror].flip(-1)
        return flipped


class RandomResizedCrop:
    """A window of random area and aspect ratio, brought to ``size`` x ``size``, bilinear.

    Args:
        size: side of the result, pixels.
        scale: range of the window's share of the area.
        ratio: range of width / height, which is uniform in the logarithm.
    """

    attempts: ClassVar[int] = 10
    count: ClassVar[int] = 2 * attempts + 2

    def __init__(
        self, size: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio

    def make_params(self, numbers: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of the windows, int64 [n] each: of the first of ten tries that lies in
        the image, else the largest window in the middle whose ratio is allowed."""
        area = uniform_between(numbers[:, : self.attempts], *self.scale) * (height * width)
        low, high = self.ratio
        ratio = uniform_between(
            numbers[:, self.attempts : 2 * self.attempts], math.log(low), math.log(high)
        ).exp()
        wide, tall = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        before = (fits.cumsum(1) == 0).sum(1)  # tries that failed
        chosen = before.clamp(max=self.attempts - 1)[:, None]
        wide, tall = wide.gather(1, chosen)[:, 0], tall.gather(1, chosen)[:, 0]
        left = uniform_integers(numbers[:, -1], width - wide + 1)
        top = uniform_integers(numbers[:, -2], height - tall + 1)
        failed = before == self.attempts
        if failed.any():
            w, h = width, height
            if width / height < low:
                h = round(width / low)
            elif width / height > high:
                w = round(height * high)
            wide, tall = torch.where(failed, w, wide), torch.where(failed, h, tall)
            left, top = (
                torch.where(failed, (width - w) // 2, left),
                torch.where(failed, (height - h) // 2, top),
            )
        return top, left, tall, wide

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        windows = self.make_params(numbers, height, width)
        if max(height, width) > self.size:  # pixels are averaged then, and torchvision has no batch of it
            size = [self.size, self.size]
            boxes = torch.stack(windows, 1).tolist()
            return torch.stack(
                [functional.resized_crop(image, *box, size) for image, box in zip(images, boxes, strict=True)]
            )
        top, left, tall, wide = windows
        x, y = self._source(left, wide, width)[:, None, :], self._source(top, tall, height)[:, :, None]
        grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1).float()
        sampled = grid_sample(images.float(), grid, padding_mode="border", align_corners=True)
        return sampled.round_().to(torch.uint8)

    def _source(self, start: Tensor, length: Tensor, side: int) -> Tensor:
        """Where the pixels of the result lie in the image, from -1, its first pixel, to 1, its last: [n, S].
        Nothing outside of the window counts, so its border pixels are repeated."""
        start, length = start[:, None].double(), length[:, None].double()
        within = (torch.arange(self.size, dtype=torch.float64) + 0.5) * (length / self.size) - 0.5
        place = start + torch.minimum(within.clamp(min=0), length - 1)
        return place * (2 / max(side - 1, 1)) - 1
