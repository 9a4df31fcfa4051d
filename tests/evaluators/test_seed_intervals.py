"""Intervals over seeds and test samples: coverage of a known truth, pairing, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pysupcon.evaluators import BootstrapConfig, BoundMetric, bootstrap
from pysupcon.evaluators.bootstrap import (
    bootstrap_values,
    difference_interval,
    mean_interval,
    percentile_interval,
    seed_and_sample_values,
)
from pysupcon.evaluators.metrics import METRICS

TRUTH = 0.7
SEEDS, SAMPLES = 8, 200
TRIALS = 600
TOLERANCE = 3.1 * math.sqrt(0.95 * 0.05 / TRIALS)
"""An interval that covers 95 % covers less than 95 % - TOLERANCE of TRIALS trials once in 1,000 times."""


def accuracy(correct: Tensor) -> BoundMetric:
    return BoundMetric(METRICS["accuracy"], [correct])


def draw_runs(generator: torch.Generator, seeds: int, ratio: float, shared: bool) -> list[BoundMetric]:
    """Runs with a normal seed effect, whose variance is ``ratio`` times that of one run over the samples.

    With ``shared``, a sample is equally hard for all seeds; otherwise the seeds fail independently.
    """
    effect = math.sqrt(ratio * TRUTH * (1 - TRUTH) / SAMPLES) * torch.randn(seeds, 1, generator=generator)
    hardness = torch.rand(1 if shared else seeds, SAMPLES, generator=generator)
    return [accuracy(row) for row in (hardness < TRUTH + effect).float()]


def coverage(ratio: float, shared: bool, seeds: int = SEEDS) -> float:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(TRIALS):
        runs = draw_runs(generator, seeds, ratio, shared)
        values = seed_and_sample_values(runs, BootstrapConfig(resamples=500, seed=trial))
        low, high = percentile_interval(values, 0.95)
        covered += low <= TRUTH <= high
    return covered / TRIALS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "shared", "highest"),
    [
        (0.0, True, 0.95 + TOLERANCE),
        (1.0, True, 0.95 + TOLERANCE),
        (16.0, True, 0.95 + TOLERANCE),
        (16.0, False, 0.95 + TOLERANCE),
        (1.0, False, 1.0),  # crossed resampling is too wide where the seeds fail independently
    ],
)
def test_the_interval_covers_the_truth(ratio: float, shared: bool, highest: float) -> None:
    assert 0.95 - TOLERANCE <= coverage(ratio, shared) <= highest


@pytest.mark.slow
def test_without_the_correction_the_interval_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage(64.0, False) >= 0.95 - TOLERANCE
    monkeypatch.setattr(bootstrap, "_few_seeds", lambda *_: 1.0)
    assert coverage(64.0, False) < 0.95 - TOLERANCE


def test_if_only_the_seeds_vary_it_is_nearly_the_t_interval() -> None:
    """The accuracies of eight seeds on test samples that all give the same: no variation by samples."""
    values = torch.linspace(0.5, 0.9, SEEDS).double()
    runs = [accuracy(value.expand(50)) for value in values]
    for confidence in (0.8, 0.95):
        config = BootstrapConfig(resamples=20_000, confidence=confidence)
        found = percentile_interval(seed_and_sample_values(runs, config), confidence)
        wanted = stats.t.interval(confidence, SEEDS - 1, values.mean(), stats.sem(values))
        assert mean_interval(values.tolist(), confidence) == pytest.approx(wanted)
        assert mean_interval(values, confidence) == pytest.approx(wanted)
        width = wanted[1] - wanted[0]
        assert found == pytest.approx(wanted, abs=0.02 * width)


def test_seeds_share_the_drawn_samples() -> None:
    """Equal runs differ in nothing: what is left are the samples, drawn as for one run."""
    correct = torch.arange(60) < 40
    config = BootstrapConfig(resamples=100, seed=3)
    one = bootstrap_values(accuracy(correct), config)
    for count in (1, 2, 8):
        torch.testing.assert_close(seed_and_sample_values([accuracy(correct)] * count, config), one)


def test_the_difference_of_results_is_paired_by_seed_and_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (draw_runs(generator, SEEDS, 4.0, True) for _ in range(2))
    less = [accuracy(x.outcomes[0] - y.outcomes[0]) for x, y in zip(a, b, strict=True)]
    config = BootstrapConfig(resamples=200, seed=5)
    difference = seed_and_sample_values(less, config)
    found = seed_and_sample_values(a, config) - seed_and_sample_values(b, config)
    torch.testing.assert_close(found, difference)
    seeds = [5, 3, 11, 0, 2, 9, 4, 8]
    order = np.argsort(seeds)
    mixed = seed_and_sample_values(a, config, seeds=seeds) - seed_and_sample_values(
        [b[i] for i in order], config, seeds=sorted(seeds)
    )
    torch.testing.assert_close(mixed, seed_and_sample_values(less, config, seeds=seeds))
    other = seed_and_sample_values(a, BootstrapConfig(200, seed=6))
    assert not torch.equal(seed_and_sample_values(a, config), other)


@pytest.mark.parametrize("others", [range(8, 16), range(16), range(4)])
def test_other_seeds_are_drawn_independently(others: range) -> None:
    """Only the seeds vary. The difference has the variance of both, not that of paired draws."""
    config = BootstrapConfig(resamples=20_000)

    def drawn(seeds: range) -> Tensor:
        runs = [accuracy(torch.tensor(float(seed % 4)).expand(5)) for seed in seeds]
        return seed_and_sample_values(runs, config, seeds=seeds)

    pair = torch.stack([drawn(range(8)), drawn(others)])
    assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(config.resamples)


def test_errors_of_seeds_and_intervals() -> None:
    config = BootstrapConfig()
    runs = [accuracy(torch.ones(4)), accuracy(torch.ones(5))]
    with pytest.raises(ValueError, match=r"runs must have outcomes of the same test samples, got \[4, 5\]"):
        seed_and_sample_values(runs, config)
    worst = [torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)]
    short = [worst[0], worst[1][:3]]
    metrics = [BoundMetric(METRICS["worst_group_accuracy"], outcomes) for outcomes in (worst, short)]
    with pytest.raises(
        ValueError, match=r"values must be of shape \[N\] with N >= 1, got shape \[4\], \[3\]"
    ):
        seed_and_sample_values(metrics, config)
    for seeds in ([1], [1, 1]):
        with pytest.raises(ValueError, match=r"a different seed for each of one or more runs, got \[1"):
            seed_and_sample_values([runs[0]] * 2, config, seeds=seeds)
    with pytest.raises(ValueError, match=r"one or more runs, got \[\] for 0 runs"):
        seed_and_sample_values([], config)
    for values in ([0.5], torch.ones(2, 2), []):
        with pytest.raises(ValueError, match=r"S >= 2: one seed says nothing about other seeds, got shape"):
            mean_interval(values, 0.95)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        mean_interval([0.1, 0.2], 95)


def test_a_difference_of_worst_groups_does_not_punish_alike_groups() -> None:
    """Two bad groups of ten against ten alike groups: the least accuracies are equal, 90 %."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(500) % 10
    two_bad, alike = torch.full((10,), 0.97), torch.full((10,), 0.9)
    two_bad[[3, 8]] = 0.9
    config, trials = BootstrapConfig(resamples=100), 6
    middle = {True: 0.0, False: 0.0}
    for _ in range(trials):
        hardness = torch.randn(500, generator=generator)
        metrics = []
        for rates in (two_bad, alike):
            place = 2**0.5 * torch.distributions.Normal(0, 1).icdf(rates)[group]
            right = [place > hardness + torch.randn(500, generator=generator) for _ in range(4)]
            metrics.append([BoundMetric(METRICS["worst_group_accuracy"], [run, group]) for run in right])
        draws = seed_and_sample_values(metrics[1], config) - seed_and_sample_values(metrics[0], config)
        value = sum(b.value() - a.value() for a, b in zip(*metrics, strict=True)) / 4
        for least in middle:
            middle[least] += sum(difference_interval(draws, value, 0.95, least=least)) / 2 / trials
    assert middle[False] < -0.04  # what the pivotal interval is for
    assert 0.7 * middle[False] < middle[True] < 0.02


def test_worst_groups_are_compared_by_pivotal_intervals() -> None:
    from pathlib import Path

    from pysupcon.evaluation.comparison import compare
    from pysupcon.reports.evaluated_runs import EvaluatedRun

    group = torch.arange(300) % 3
    figures = ["worst_group/erm/worst_group_accuracy", "worst_group/erm/accuracy"]
    runs = []
    for loss, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        right = torch.rand(300, generator=torch.Generator().manual_seed(ord(loss) + seed)) < 0.8
        outcomes = {"labels/fine": group, "labels/coarse": group}
        outcomes |= {"worst_group/erm/correct": right, "worst_group/erm/group": group}
        runs.append(EvaluatedRun(Path(f"{loss}{seed}"), {"seed": seed, "loss": loss}, outcomes, figures))
    found = compare(runs)
    for name, least in zip(figures, (True, False), strict=True):
        definition = METRICS[name.rpartition("/")[2]]
        parts = ("correct", "group") if least else ("correct",)
        bound = [
            BoundMetric(definition, [run.outcomes[f"worst_group/erm/{part}"] for part in parts])
            for run in runs
        ]
        config = BootstrapConfig()
        draws = seed_and_sample_values(bound[2:], config) - seed_and_sample_values(bound[:2], config)
        (difference,) = found.differences[name].values()
        low, high = percentile_interval(draws, 0.95)
        if least:
            low, high = 2 * difference.value - high, 2 * difference.value - low
        assert (difference.low, difference.high) == pytest.approx((low, high))
