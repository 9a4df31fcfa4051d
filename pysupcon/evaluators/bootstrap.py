"""Percentile bootstrap over the test samples (Efron 1979; protocol of SINCERE, arXiv 2309.14277), or over
seeds and test samples, and Student-t intervals over seeds.

One run says nothing about other seeds: its interval is for this trained model on other test samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random

import torch
from torch import Tensor

from pysupcon.evaluators.base import Result
from pysupcon.evaluators.metrics import METRICS, BoundMetric, bind_metric

_CHUNK_ELEMENTS = 1 << 22
_MOST_COUNTS = 1 << 27
"""Draws up to which their counts are kept: 128 MiB."""
_MOST_EXACT = 1 << 24
"""Whole numbers up to this one are exact in float32."""


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
    _check_samples(metric)
    return _values([metric], config)[:, 0]


def _check_samples(metric: BoundMetric) -> None:
    n = len(metric.outcomes[0])
    if any(outcome.shape != (n,) for outcome in metric.outcomes) or n == 0:
        shapes = [list(outcome.shape) for outcome in metric.outcomes]
        raise ValueError(f"values must be of shape [N] with N >= 1, got shape {', '.join(map(str, shapes))}")


def _values(metrics: Sequence[BoundMetric], config: BootstrapConfig) -> Tensor:
    """Values of metrics of equally many samples on the same resamples, [resamples, metrics]."""
    outcomes = [[outcome.detach().cpu() for outcome in metric.outcomes] for metric in metrics]
    n = len(outcomes[0][0])
    counted = [
        metric.definition.from_counts
        for metric, of_metric in zip(metrics, outcomes, strict=True)
        if metric.definition.from_counts is not None and of_metric[0].dtype == torch.bool
    ]
    if len(counted) == len(metrics) and n * config.resamples <= _MOST_COUNTS and n < _MOST_EXACT:
        counts = _draw_counts(n, config.resamples, config.seed)
        blocks = (block.float() for block in counts.split(max(1, _CHUNK_ELEMENTS // n)))
        return _stack_blocks(
            [compute(block, *known) for compute, known in zip(counted, outcomes, strict=True)]
            for block in blocks
        )
    return _stack_blocks(
        [
            metric.definition.compute(*(outcome[indices] for outcome in known))
            for metric, known in zip(metrics, outcomes, strict=True)
        ]
        for indices in _draws(n, config.resamples, config.seed)
    )


def _stack_blocks(blocks: Iterable[list[Tensor]]) -> Tensor:
    """Values by block and metric, [R] each, as [resamples, metrics]."""
    return torch.cat([torch.stack(block, dim=1) for block in blocks])


def _draws(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """The drawn test samples of all resamples, in blocks [R, N]."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, rows):
        yield torch.randint(n, (min(rows, resamples - start), n), generator=generator)


@lru_cache(maxsize=2)  # the metrics of one test set use the same draws
def _draw_counts(n: int, resamples: int, seed: int) -> Tensor:
    """How often each resample drew each test sample, [resamples, N] uint8. A count is at most N, and for an
    N above 255 a count above 255 has a probability below 1e-500."""
    blocks = []
    for indices in _draws(n, resamples, seed):
        counts = torch.zeros(indices.shape, dtype=torch.uint8)
        blocks.append(counts.scatter_add_(1, indices, torch.ones_like(counts)))
    return torch.cat(blocks)


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


def difference_interval(
    draws: Tensor, value: float, confidence: float, *, least: bool = False
) -> tuple[float, float]:
    """The interval of a difference of two metrics.

    It is the percentile interval, or, for metrics that are the least of several values, the pivotal one,
    [2 value - high, 2 value - low] of the percentile interval (Davison and Hinkley 1997, section 5.2): a
    resample lowers the worst group, as the test set did, and more so where several groups are nearly as bad.
    The percentile interval of a difference is then off by both. In simulations without a difference (two bad
    groups of ten against ten alike, 8 seeds, 1,000 samples), it lay below 0 in 40 % of the cases, the pivotal
    one in 2 %.

    Args:
        draws: [R], differences on the resamples.
        value: the difference on the test samples.
        confidence: the confidence level.
        least: see :class:`pysupcon.evaluators.metrics.MetricDefinition`.
    """
    low, high = percentile_interval(draws, confidence)
    return (2 * value - high, 2 * value - low) if least else (low, high)


def seed_and_sample_values(
    runs: Sequence[BoundMetric], config: BootstrapConfig, *, seeds: Sequence[int] | None = None
) -> Tensor:
    """Mean of a metric over ``runs``, one per seed, on resamples of the seeds and of the test samples.

    The two are crossed (Owen 2007, arXiv 0712.1111): in a resample all seeds share the drawn test samples,
    those of :func:`bootstrap_values`. With V_s the metric of run s on them, the value is

        mean over all seeds of V_s + f (mean over the drawn seeds of V_s - mean over all seeds of V_s),
        f = sqrt(S / (S - 1)) t / z,

    with t and z the quantiles at (1 + confidence) / 2 of Student's t with S - 1 degrees of freedom and of the
    normal distribution. Without f, a percentile interval of few seeds is too narrow: if only the seeds vary,
    one of 95 % covers 88 % for 8 seeds and 50 % for 2. The interval may leave the range of the metric.
    It is too wide where the seeds fail on different samples at random, because both parts count that.

    One run has no seed component: the result is that of :func:`bootstrap_values`.

    Args:
        runs: the metric of each run, all with the same N test samples in the same order.
        config: number and seed of the resamples, and the confidence level of f.
        seeds: the training seed of each run; None means 0, 1, ...

    Returns:
        [resamples] float64 on the CPU. Results for the same seeds (in any order), N and ``config`` have the
        same draws: their difference is the paired difference, by seed and by test sample. For other seeds or
        another number of them, the test samples are paired and the seeds are drawn independently.

    Raises:
        ValueError: there are no runs, they differ in N, or ``seeds`` does not hold one seed per run.
    """
    seeds = range(len(runs)) if seeds is None else seeds
    if not runs or len(seeds) != len(runs) or len(set(seeds)) != len(runs):
        raise ValueError(
            f"seeds must hold a different seed for each of one or more runs, got {list(seeds)} for "
            f"{len(runs)} runs"
        )
    samples = [len(run.outcomes[0]) for run in runs]
    if len(set(samples)) > 1:
        raise ValueError(f"runs must have outcomes of the same test samples, got {samples} of them")
    order = sorted(range(len(runs)), key=lambda run: seeds[run])
    for run in runs:
        _check_samples(run)
    values = _values([runs[run] for run in order], config)
    mean = values.mean(dim=1)
    count = len(runs)
    if count == 1:
        return mean
    # Text seeds of random.Random are hashed: other seeds of the runs give unrelated draws.
    mixed = Random(f"{config.seed} {sorted(seeds)}").getrandbits(63)
    generator = torch.Generator().manual_seed(mixed)
    drawn = torch.randint(count, (config.resamples, count), generator=generator)
    return mean + _few_seeds(count, config.confidence) * (values.gather(1, drawn).mean(dim=1) - mean)


def _few_seeds(count: int, confidence: float) -> float:
    """Ratio of the half-widths of a Student-t interval and of a percentile interval of ``count`` values."""
    from scipy.stats import norm, t

    quantile = (1 + confidence) / 2
    return sqrt(count / (count - 1)) * float(t.ppf(quantile, count - 1) / norm.ppf(quantile))


def mean_interval(values: Sequence[float] | Tensor, confidence: float) -> tuple[float, float]:
    """Student-t interval of the mean of ``values`` [S], one per seed.

    It treats the test set as fixed. For paired differences, give the differences by seed.

    Raises:
        ValueError: there are fewer than two values, or ``confidence`` is not in (0, 1).
    """
    from scipy.stats import t

    found = torch.as_tensor(values, dtype=torch.float64)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(
            f"values must be of shape [S] with S >= 2: one seed says nothing about other seeds, got shape "
            f"{list(found.shape)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    half = float(t.ppf((1 + confidence) / 2, len(found) - 1) * found.std() / sqrt(len(found)))
    mean = float(found.mean())
    return mean - half, mean + half


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
