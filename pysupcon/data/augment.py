"""Views of images: whole batches, uint8 in and uint8 out, right for each family of data."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torchvision.transforms import v2

from pysupcon.data.colour import ColorJitter, RandomGrayscale
from pysupcon.data.geometry import RandomAffine, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from pysupcon.data.sources import Family

_CHUNK = 128  # images at once: what lies between two steps then stays in the cache


class BatchTransform(Protocol):
    """A random change of a batch, see :mod:`pysupcon.data.geometry`."""

    @property
    def count(self) -> int: ...

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor: ...


class ResizeCenterCrop:
    """Images as they are, brought to ``size`` x ``size`` by resizing the shorter side and cutting the middle
    out: uint8 [..., C, H, W]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def __call__(self, images: Tensor) -> Tensor:
        return images if images.shape[-2:] == (self.size, self.size) else self.resize(images)


class Augmentation:
    """Random views of images.

    Args:
        strength: none, weak or strong; see ``DataConfig.augmentation``.
        family: digits are neither flipped nor coloured, grey images are flipped, colour images also jittered
            in colour (Khosla et al. 2020, appendix; Chen et al. 2022).
        size: side of the views, pixels.

    Attributes:
        count: random numbers that a view needs.
    """

    def __init__(self, strength: Literal["none", "weak", "strong"], family: Family, size: int) -> None:
        self.size = size
        # RandomResizedCrop resizes by itself.
        self.resize = None if strength == "strong" else ResizeCenterCrop(size)
        self.steps: list[BatchTransform] = []
        if strength == "weak" and family == "digits":
            self.steps = [RandomAffine(10, translate=0.1)]
        elif strength == "weak":
            self.steps = [RandomCrop(max(size // 8, 1)), RandomHorizontalFlip()]
        elif strength == "strong" and family == "digits":
            # a digit fills its image: a crop below half of the area would cut it apart
            self.steps = [RandomAffine(15, shear=10), RandomResizedCrop(size, (0.5, 1.0))]
        elif strength == "strong":
            self.steps = [RandomResizedCrop(size, (0.2, 1.0)), RandomHorizontalFlip()]
            if family == "colour":
                self.steps += [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomGrayscale(0.2)]
        self.count = sum(step.count for step in self.steps)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """One view of every image.

        Args:
            images: uint8 [n, C, H, W].
            numbers: uniform in [0, 1), float64 [n, V, count]; a view is a function of its image and its
                numbers.

        Returns:
            uint8 [n, V, C, size, size]; without a random step all views of an image share their memory.
        """
        views = numbers.shape[1]
        if not self.steps:
            fitted = images if self.resize is None else self.resize(images)
            return fitted.unsqueeze(1).expand(-1, views, -1, -1, -1)
        result = images.new_empty(len(images), views, images.shape[1], self.size, self.size)
        for start in range(0, len(images), max(_CHUNK // views, 1)):
            part = slice(start, start + max(_CHUNK // views, 1))
            chunk = images[part] if self.resize is None else self.resize(images[part])
            result[part] = self._views(chunk, numbers[part])
        return result

    def _views(self, images: Tensor, numbers: Tensor) -> Tensor:
        count, views = numbers.shape[:2]
        several = images.unsqueeze(1).expand(-1, views, -1, -1, -1).flatten(0, 1)
        first = 0
        for step in self.steps:
            several = step(several, numbers.flatten(0, 1)[:, first : first + step.count])
            first += step.count
        return several.unflatten(0, (count, views))


class Normalize:
    """uint8 images [..., C, H, W] to float32 of about zero mean and unit variance a channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:  # once, not every step
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images.to(torch.float32) / 255 - self.mean) / self.std
