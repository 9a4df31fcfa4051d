"""Random geometric transforms of batches, as in torchvision but with parameters of its own for every sample.

Every transform maps uint8 images [n, C, H, W] and uniform random numbers, float64 [n, num_uniforms] in
[0, 1), to uint8 images. The result for a sample depends only on its image and its uniforms, not on the rest
of the batch. The distribution of the parameters and the pixels for given parameters are those of the
torchvision.transforms.v2 class of the same name.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torchvision.transforms.v2 import functional


def uniform_between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Scales uniforms from [0, 1) to [low, high)."""
    return low + (high - low) * uniform


def uniform_integers(uniform: Tensor, bound: int | Tensor) -> Tensor:
    """Integers in [0, bound) with equal probability, int64, from uniforms in [0, 1)."""
    return (uniform * bound).long()


class RandomAffine:
    """Rotates, translates by whole pixels and shears along x, about the centre; bilinear, black outside.

    Args:
        degrees: range [-degrees, degrees] of the angle.
        translate: range [-translate, translate] of the shift along each axis, as a fraction of the side.
        shear: range [-shear, shear] of the shear angle, in degrees.
    """

    num_uniforms: ClassVar[int] = 4

    def __init__(self, degrees: float, translate: float = 0.0, shear: float = 0.0) -> None:
        self.degrees, self.translate, self.shear = degrees, translate, shear

    def make_params(self, uniforms: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Angles [n] and shears [n] in degrees, and shifts (x, y) [n, 2] in pixels."""
        sides = torch.tensor([width, height], dtype=torch.float64)
        shift = uniform_between(uniforms[:, 1:3], -self.translate, self.translate) * sides
        return (
            uniform_between(uniforms[:, 0], -self.degrees, self.degrees),
            uniform_between(uniforms[:, 3], -self.shear, self.shear),
            shift.round(),
        )

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        angle, shear, shift = self.make_params(uniforms, height, width)
        cos, sin, tan = (each[:, None, None] for each in (*_cos_sin(angle), torch.deg2rad(shear).tan()))
        # The inverse of rotation times shear: from a pixel of the result to its source.
        x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) - shift[:, 0, None, None]
        y = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None] - shift[:, 1, None, None]
        from_x = (cos - sin * tan) * x + (sin + cos * tan) * y
        from_y = cos * y - sin * x
        grid = torch.stack([from_x / (width / 2), from_y / (height / 2)], dim=-1).float()
        # Pixels at the border are blended with black by the covered fraction, as in torchvision.
        inside = images.new_ones(len(images), 1, height, width)
        sampled = grid_sample(torch.cat([images, inside], 1).float(), grid, align_corners=False)
        return (sampled[:, :-1] * sampled[:, -1:]).round_().to(torch.uint8)


def _cos_sin(degrees: Tensor) -> tuple[Tensor, Tensor]:
    radians = torch.deg2rad(degrees)
    return radians.cos(), radians.sin()


class RandomCrop:
    """Pads every side with ``padding`` black pixels and crops a window of the original size."""

    num_uniforms: ClassVar[int] = 2

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def make_params(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Top and left of the windows in the padded image, int64 [n] each."""
        corners = uniform_integers(uniforms[:, :2], 2 * self.padding + 1)
        return corners[:, 0], corners[:, 1]

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left = self.make_params(uniforms)
        rows = (top[:, None] + torch.arange(height))[:, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, :]
        source = (rows * (width + 2 * self.padding) + columns).flatten(1)[:, None]
        padded = pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, source.expand(-1, images.shape[1], -1)).view(images.shape)


class RandomHorizontalFlip:
    """Flips left to right with probability one half."""

    num_uniforms: ClassVar[int] = 1

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        flipped = images.clone()
        mirror = uniforms[:, 0] < 0.5
        flipped[mirror] = images[mirror].flip(-1)
        return flipped


class RandomResizedCrop:
    """Crops a window of random area and aspect ratio and resizes it to ``size`` x ``size``, bilinear.

    Args:
        size: side of the result, in pixels.
        scale: range of the window's area, as a fraction of the image's area.
        ratio: range of width / height, whose logarithm is uniform.
    """

    attempts: ClassVar[int] = 10
    num_uniforms: ClassVar[int] = 2 * attempts + 2

    def __init__(
        self, size: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio

    def make_params(self, uniforms: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of the windows, int64 [n] each.

        The first of ten attempts that fits into the image is taken, else the largest central window with an
        allowed ratio.
        """
        area = uniform_between(uniforms[:, : self.attempts], *self.scale) * (height * width)
        low, high = self.ratio
        ratio = uniform_between(
            uniforms[:, self.attempts : 2 * self.attempts], math.log(low), math.log(high)
        ).exp()
        wide, tall = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        before = (fits.cumsum(1) == 0).sum(1)  # failed attempts
        chosen = before.clamp(max=self.attempts - 1)[:, None]
        wide, tall = wide.gather(1, chosen)[:, 0], tall.gather(1, chosen)[:, 0]
        left = uniform_integers(uniforms[:, -1], width - wide + 1)
        top = uniform_integers(uniforms[:, -2], height - tall + 1)
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

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        windows = self.make_params(uniforms, height, width)
        if max(height, width) > self.size:  # antialiased, which torchvision has per image only
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
        """Source coordinates [n, S] of the result's pixels, from -1 (first pixel of the image) to 1 (last).

        Coordinates are clamped to the window, so its border pixels are repeated.
        """
        start, length = start[:, None].double(), length[:, None].double()
        offset = (torch.arange(self.size, dtype=torch.float64) + 0.5) * (length / self.size) - 0.5
        position = start + torch.minimum(offset.clamp(min=0), length - 1)
        return position * (2 / max(side - 1, 1)) - 1
