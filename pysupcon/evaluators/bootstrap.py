"""Percentile bootstrap over the test samples (Efron 1979; protocol of SINCERE, arXiv 2309.14277)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Result

_CHUNK_ELEMENTS = 1 << 22


@dataclass
class BootstrapConfig:
    """Percentile interval of an accuracy.

    Args:
        resamples: resamples of the test set, each with replacement and of its size.
        confidence: share of the resampled accuracies that the interval holds, in (0, 1).
        seed: the same seed draws the same resamples for every accuracy over as many samples, which are thus
            paired.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")


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


def accuracy_results(prefix: str, correct: Tensor, config: BootstrapConfig) -> Iterator[Result]:
    """``prefix/accuracy``, its interval as ``/low`` and ``/high``, and the outcomes as ``prefix/correct``.

    Args:
        prefix: name without the last part.
        correct: [N] bool, whether each test sample was classified rightly.
        config: resamples, confidence and seed.
    """
    low, high = percentile_interval(resampled_means(correct, config), config.confidence)
    yield f"{prefix}/accuracy", correct.double().mean().item()
    yield f"{prefix}/accuracy/low", low
    yield f"{prefix}/accuracy/high", high
    yield f"{prefix}/correct", correct.detach().cpu()
