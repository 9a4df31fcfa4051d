"""A training loop as one writes it from torchvision's examples; trainer_speed.py measures it and the trainer.

A Dataset returns two views of a sample, made by torchvision.transforms.v2 one image at a time, and a
DataLoader collates them. The transforms have the strengths of :class:`pysupcon.data.augment.Augmentation`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of embeddings [B * V, D], the views of a sample one after another, and their labels [B * V]"""


class Form(NamedTuple):
    """Choices in the loader that decide about its speed."""

    workers: int
    pil: bool
    """whether the transforms get PIL images; else uint8 tensors"""

    def __str__(self) -> str:
        return f"{self.workers} workers, {'PIL images' if self.pil else 'tensors'}"


WORKERS = (0, 2)
FORMS = tuple(Form(workers, pil) for workers in WORKERS for pil in (False, True))


def strong_transform(
    family: str, size: int, mean: Sequence[float], std: Sequence[float], pil: bool
) -> v2.Compose:
    """The augmentation "strong" for images of ``family``, normalised."""
    if family == "digits":
        steps: list[Any] = [
            v2.RandomAffine(15, shear=10, interpolation=InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(size, (0.5, 1.0)),
        ]
    else:
        steps = [v2.RandomResizedCrop(size, (0.2, 1.0)), v2.RandomHorizontalFlip()]
    if family == "colour":
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
    steps.insert(len(steps) if pil else 0, v2.ToImage())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class TwoViews(Dataset[tuple[Tensor, int]]):
    """Items are (views float32 [2, C, S, S], label).

    Args:
        images: uint8 [N, C, H, W], or files of colour images.
        labels: int64 [N].
        transform: makes a view.
        pil: whether it gets a PIL image.
    """

    def __init__(
        self, images: Tensor | Sequence[Path], labels: Tensor, transform: Callable[[Any], Tensor], pil: bool
    ) -> None:
        self.images, self.labels, self.transform, self.pil = images, labels.tolist(), transform, pil

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Any = self.images[index]
        if isinstance(image, Path):
            image = Image.open(image).convert("RGB")
        elif self.pil:
            image = v2.functional.to_pil_image(image)
        if not self.pil:
            image = v2.functional.to_image(image)  # once for both views
        return torch.stack([self.transform(image), self.transform(image)]), self.labels[index]


def loader(dataset: TwoViews, batch_size: int, workers: int) -> DataLoader[Any]:
    """Shuffled batches; the worker processes stay from epoch to epoch."""
    return DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )


def batches(data: DataLoader[Any], memory_format: torch.memory_format) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless epochs of (images [B * 2, C, S, S], labels [B * 2])."""
    while True:
        for views, labels in data:
            images = views.flatten(0, 1).contiguous(memory_format=memory_format)
            yield images, labels.repeat_interleave(2)


def training(
    data: DataLoader[Any],
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    memory_format: torch.memory_format,
) -> Iterator[float]:
    """Endless training; yields the loss of every step."""
    model.train()
    for images, labels in batches(data, memory_format):
        value = loss(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()
