"""Linear heads on frozen features, trained by ERM or GroupDRO (Sagawa et al. 2020, arXiv 1911.08731)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysupcon.group_dro import GroupDRO

from .linear_probe import _bar, _standardization
from .statistics import worst_group


@dataclass
class HeadConfig:
    """A linear head on frozen features, trained by ERM (the mean loss) or GroupDRO."""

    learning_rate: float = 0.05
    """Of SGD with momentum 0.9, falling to zero along a cosine."""

    weight_decays: list[float] = field(default_factory=lambda: [1e-4, 1e-2, 1e-1])
    """Tried; the best worst-group accuracy on validation chooses among them and among the epochs. GroupDRO
    differs from ERM only where the head cannot fit everything: by strong decay or early stopping."""

    epochs: int = 40
    """Passes over the training features."""

    batch_size: int = 128
    """Samples in a step."""

    eta: float = 0.01
    """GroupDRO's step of the groups' weights."""

    adjustment: float = 0.0
    """GroupDRO's C: C / sqrt(n_g) is added to the loss of a group of n_g samples."""

    uniform_groups: bool = True
    """GroupDRO draws every group equally often (with replacement); else batches are shuffled samples."""

    seed: int = 0
    """Of the first weights and the batches."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"head.learning_rate must be > 0, got {self.learning_rate}")
        if not self.weight_decays or any(not value >= 0 for value in self.weight_decays):
            raise ValueError(f"head.weight_decays must be one or more numbers >= 0, got {self.weight_decays}")
        for name in ("eta", "adjustment"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"head.{name} must be >= 0, got {getattr(self, name)}")


class Head(NamedTuple):
    """A linear classifier of raw features; ``weight`` [C, D] and ``bias`` [C] fp64 on the CPU."""

    weight: Tensor
    bias: Tensor
    val_worst_group: float
    weight_decay: float
    epoch: int

    def scores(self, features: Tensor) -> Tensor:
        """[N, C] fp64 logits of ``features`` [N, D]."""
        return torch.addmm(self.bias, features.to("cpu", torch.float64), self.weight.T)


class Labelled(NamedTuple):
    """Features [N, D], class indices [N] and groups [N], both int64."""

    features: Tensor
    classes: Tensor
    groups: Tensor


def group_batches(
    groups: Tensor, batch_size: int, uniform: bool, generator: torch.Generator
) -> Iterator[Tensor]:
    """Row numbers of the batches of one epoch.

    Args:
        groups: [N] int64.
        uniform: every group with equal probability, whatever its size, with replacement; else every sample
            once, shuffled.
    """
    n = len(groups)
    if uniform:
        weights = (1 / torch.bincount(groups).double())[groups]
        order = torch.multinomial(weights, n, replacement=True, generator=generator)
    else:
        order = torch.randperm(n, generator=generator)
    yield from order.split(batch_size)


def fit_head(
    train: Labelled, val: Labelled, classes: int, config: HeadConfig, *, robust: bool, progress: bool = False
) -> Head:
    """Trains on ``train``: GroupDRO over its groups if ``robust``, else ERM, which does not look at them.

    The weight decay and the epoch with the best worst-group accuracy on ``val``, by its groups, are kept; of
    equally good ones the stronger decay and the later epoch.
    """
    x = train.features.to("cpu", torch.float64)
    mean, std = _standardization(x)
    data = ((x - mean) / std).float()
    val_data = ((val.features.to("cpu", torch.float64) - mean) / std).float()
    counts = torch.bincount(train.groups)
    best: Head | None = None
    name = "GroupDRO" if robust else "ERM"
    for decay in sorted(set(config.weight_decays), reverse=True):
        generator = torch.Generator().manual_seed(config.seed)
        head = nn.utils.skip_init(nn.Linear, x.shape[1], classes)  # leaves the global random state alone
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        objective = GroupDRO(counts, eta=config.eta, adjustment=config.adjustment)
        optimizer = torch.optim.SGD(head.parameters(), config.learning_rate, momentum=0.9, weight_decay=decay)
        steps = config.epochs * -(-len(data) // config.batch_size)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in _bar(range(config.epochs), progress, f"{name}, decay {decay:g}"):
            for rows in group_batches(
                train.groups, config.batch_size, robust and config.uniform_groups, generator
            ):
                losses = F.cross_entropy(head(data[rows]), train.classes[rows], reduction="none")
                optimizer.zero_grad()
                (objective(losses, train.groups[rows]) if robust else losses.mean()).backward()
                optimizer.step()
                scheduler.step()
            with torch.no_grad():
                correct = head(val_data).argmax(dim=1) == val.classes
            worst = worst_group(correct, val.groups).item()
            if (
                best is None
                or worst > best.val_worst_group
                or (worst, decay) == (best.val_worst_group, best.weight_decay)
            ):
                weight = head.weight.detach().double() / std
                bias = head.bias.detach().double() - weight @ mean
                best = Head(weight, bias, worst, decay, int(epoch))
    assert best is not None
    return best
