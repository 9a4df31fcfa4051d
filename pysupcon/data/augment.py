"""Views of an image: torchvision transforms, uint8 in and uint8 out, right for each family of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from pysupcon.data.sources import Family

Transform = Callable[[Tensor], Tensor]


def plain_transform(size: int) -> Transform:
    """The image as it is, brought to ``size`` x ``size`` by resizing its shorter side and cutting the middle
    out."""
    fit = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def transform(image: Tensor) -> Tensor:
        return image if image.shape[-2:] == (size, size) else fit(image)

    return transform


def view_transform(strength: Literal["none", "weak", "strong"], family: Family, size: int) -> Transform:
    """One random view. The random numbers are torch's global ones.

    Args:
        strength: none, weak or strong; see ``DataConfig.augmentation``.
        family: digits are neither flipped nor coloured, grey images are flipped, colour images also jittered
            in
            colour (Khosla et al. 2020, appendix; Chen et al. 2022).
        size: side of the view, pixels.
    """
    if strength == "none":
        return plain_transform(size)
    bilinear = v2.InterpolationMode.BILINEAR
    shift = max(size // 8, 1)
    steps: list[Transform] = []
    if strength == "weak":
        steps.append(plain_transform(size))
        if family == "digits":
            steps.append(v2.RandomAffine(10, translate=(0.1, 0.1), interpolation=bilinear))
        else:
            steps += [v2.RandomCrop(size, padding=shift), v2.RandomHorizontalFlip()]
        return v2.Compose(steps)
    if family == "digits":
        # a digit fills its image: a crop below half of the area would cut it apart
        steps += [
            v2.RandomAffine(15, shear=10, interpolation=bilinear),
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
        ]
    else:
        steps += [v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if family == "colour":
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
    return v2.Compose(steps)


class Normalize:
    """uint8 images [..., C, H, W] to float32 of about zero mean and unit variance a channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:  # once, not every step
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images.to(torch.float32) / 255 - self.mean) / self.std
