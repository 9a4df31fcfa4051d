"""Percentile bootstrap over the test samples (Efron 1979; protocol of SINCERE, arXiv 2309.14277)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pysupcon.evaluators.base import Result
from pysupcon.evaluators.metrics import METRICS, BoundMetric, bind_metric

_CHUNK_ELEMENTS = 1 << 22


@dataclass
class BootstrapConfig:
    """Percentile interval of every figure that has one outcome per test sample behind it."""

    resamples: int = 1000
    """Resamples of the test set, each with replacement and of its size."""

    confidence: float = 0.95
    """Share of the resampled figures that the interval holds, in (0, 1)."""

    seed: int = 0
    """The same seed draws the same resamples for every figure over as many samples, which are thus
    paired."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"bootstrap.resamples must be at least 1, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"bootstrap.confidence must be in (0, 1), got {self.confidence}")


def bootstrap_values(figure: BoundMetric, config: BootstrapConfig) -> Tensor:
    """The figure of each resample of its samples, [resamples] float64 on the CPU.

    The difference of two such results of equal N and seed is the bootstrap distribution of the *paired*
    difference.
    """
    n = len(figure.outcomes[0])
    if any(outcome.shape != (n,) for outcome in figure.outcomes) or n == 0:
        shapes = [list(outcome.shape) for outcome in figure.outcomes]
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {', '.join(map(str, shapes))}")
    outcomes = [outcome.detach().cpu() for outcome in figure.outcomes]
    generator = torch.Generator().manual_seed(config.seed)
    rows, values = max(1, _CHUNK_ELEMENTS // n), []
    for start in range(0, config.resamples, rows):
        count = min(rows, config.resamples - start)
        drawn = torch.randint(n, (count, n), generator=generator)
        values.append(figure.metric.compute(*(outcome[drawn] for outcome in outcomes)))
    return torch.cat(values)


def bootstrap_means(values: Tensor, config: BootstrapConfig) -> Tensor:
    """Means of ``values`` [N] (any real dtype) over each resample; see :func:`bootstrap_values`."""
    if values.ndim != 1:
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {list(values.shape)}")
    return bootstrap_values(BoundMetric(METRICS["accuracy"], [values]), config)


def percentile_interval(means: Tensor, confidence: float) -> tuple[float, float]:
    """The central interval that holds ``confidence`` of ``means`` [R]."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def with_intervals(results: Iterable[Result], config: BootstrapConfig) -> Iterator[Result]:
    """Passes ``results`` on; then adds ``F/low`` and ``F/high`` for every figure F that follows from outcomes
    (see :mod:`pysupcon.evaluators.metrics`)."""
    names: list[str] = []
    outcomes: dict[str, Tensor] = {}
    for name, value in results:
        yield name, value
        if isinstance(value, Tensor):
            outcomes[name] = value
        else:
            names.append(name)
    for name in names:
        figure = bind_metric(name, outcomes)
        if figure is not None:
            low, high = percentile_interval(bootstrap_values(figure, config), config.confidence)
            yield f"{name}/low", low
            yield f"{name}/high", high
