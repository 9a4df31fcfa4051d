"""Percentile bootstrap over the test samples (Efron 1979; protocol of SINCERE, arXiv 2309.14277)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Result

_CHUNK_ELEMENTS = 1 << 22


@dataclass
class BootstrapConfig:
    """Percentile interval of an accuracy."""

    resamples: int = 1000
    """Resamples of the test set, each with replacement and of its size."""

    confidence: float = 0.95
    """Share of the resampled accuracies that the interval holds, in (0, 1)."""

    seed: int = 0
    """The same seed draws the same resamples for every accuracy over as many samples, which are thus
    paired."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"bootstrap.resamples must be at least 1, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"bootstrap.confidence must be in (0, 1), got {self.confidence}")


def resampled_means(values: Tensor, config: BootstrapConfig) -> Tensor:
    """Means of ``values`` [N] (any real dtype) over each resample, [resamples] float64 on the CPU.

    The difference of two such results of equal N and seed is the bootstrap distribution of the *paired*
    difference.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {list(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    n, rows = len(values), max(1, _CHUNK_ELEMENTS // len(values))
    means = []
    for start in range(0, config.resamples, rows):
        count = min(rows, config.resamples - start)
        means.append(values[torch.randint(n, (count, n), generator=generator)].mean(dim=1))
    return torch.cat(means)


def percentile_interval(means: Tensor, confidence: float) -> tuple[float, float]:
    """The central interval that holds ``confidence`` of ``means`` [R]."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def with_intervals(results: Iterable[Result], config: BootstrapConfig) -> Iterator[Result]:
    """Passes ``results`` on; adds ``X/accuracy/low`` and ``X/accuracy/high`` after every ``X/correct``."""
    for name, value in results:
        yield name, value
        prefix, _, last = name.rpartition("/")
        if last == "correct" and isinstance(value, Tensor):
            low, high = percentile_interval(resampled_means(value, config), config.confidence)
            yield f"{prefix}/accuracy/low", low
            yield f"{prefix}/accuracy/high", high
