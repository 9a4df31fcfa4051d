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
    """Percentile intervals of all metrics of outcomes per test sample."""

    resamples: int = 1000
    """Resamples of the test set, drawn with replacement, each of its size."""

    confidence: float = 0.95
    """Fraction of the resampled values inside the interval, in (0, 1)."""

    seed: int = 0
    """Seed of the resamples. Metrics over equally many samples use the same resamples, so they are paired."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"bootstrap.resamples must be at least 1, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"bootstrap.confidence must be in (0, 1), got {self.confidence}")


def bootstrap_values(metric: BoundMetric, config: BootstrapConfig) -> Tensor:
    """Values of a metric on the resamples, [resamples] float64 on the CPU.

    For equal N and seed, the difference of two results is the bootstrap distribution of the paired
    difference.
    """
    n = len(metric.outcomes[0])
    if any(outcome.shape != (n,) for outcome in metric.outcomes) or n == 0:
        shapes = [list(outcome.shape) for outcome in metric.outcomes]
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {', '.join(map(str, shapes))}")
    outcomes = [outcome.detach().cpu() for outcome in metric.outcomes]
    generator = torch.Generator().manual_seed(config.seed)
    rows, values = max(1, _CHUNK_ELEMENTS // n), []
    for start in range(0, config.resamples, rows):
        count = min(rows, config.resamples - start)
        indices = torch.randint(n, (count, n), generator=generator)
        values.append(metric.definition.compute(*(outcome[indices] for outcome in outcomes)))
    return torch.cat(values)


def bootstrap_means(values: Tensor, config: BootstrapConfig) -> Tensor:
    """Mean of ``values`` [N] (any real dtype) on each resample, see :func:`bootstrap_values`."""
    if values.ndim != 1:
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {list(values.shape)}")
    return bootstrap_values(BoundMetric(METRICS["accuracy"], [values]), config)


def percentile_interval(means: Tensor, confidence: float) -> tuple[float, float]:
    """The central interval that contains the fraction ``confidence`` of ``means`` [R]."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def with_intervals(results: Iterable[Result], config: BootstrapConfig) -> Iterator[Result]:
    """Yield ``results``, then ``M/low`` and ``M/high`` for every metric M of outcomes.

    See :mod:`pysupcon.evaluators.metrics`.
    """
    names: list[str] = []
    outcomes: dict[str, Tensor] = {}
    for name, value in results:
        yield name, value
        if isinstance(value, Tensor):
            outcomes[name] = value
        else:
            names.append(name)
    for name in names:
        metric = bind_metric(name, outcomes)
        if metric is not None:
            low, high = percentile_interval(bootstrap_values(metric, config), config.confidence)
            yield f"{name}/low", low
            yield f"{name}/high", high
