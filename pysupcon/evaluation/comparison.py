"""Compare the metrics of evaluated runs on the same test samples.

Runs whose configs differ only in the seed form one configuration. Its metrics are means over its seeds. The
intervals resample seeds and test samples, see :func:`pysupcon.evaluators.bootstrap.seed_and_sample_values`.
With one seed, they resample the test samples only and say nothing about other seeds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from pysupcon.errors import RunError
from pysupcon.evaluators import BootstrapConfig, BoundMetric, bind_metric
from pysupcon.evaluators.bootstrap import (
    difference_interval,
    percentile_interval,
    seed_and_sample_values,
)
from pysupcon.reports.evaluated_runs import (
    Configuration,
    EvaluatedRun,
    check_same_test_set,
    configurations,
)

_FREE_SETTINGS = ("chunk_bytes",)
"""Arguments of evaluators that change no result."""


@dataclass(frozen=True)
class Value:
    """A metric of one configuration.

    Attributes:
        mean: mean over the seeds.
        spread: standard deviation over the seeds, None for one seed.
        low, high: bootstrap interval of the mean, over seeds and test samples, or over test samples for one
            seed.
        seeds: the metric of each run.
    """

    mean: float
    spread: float | None
    low: float
    high: float
    seeds: list[float]


@dataclass(frozen=True)
class Difference:
    """A metric of one configuration minus that of the baseline, with its bootstrap interval.

    The interval is paired by test sample, and by seed if both configurations have the same seeds. For worst
    groups it is pivotal, see :func:`pysupcon.evaluators.bootstrap.difference_interval`.
    """

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`.

    Attributes:
        configurations: the configurations in order.
        baseline: name of the baseline configuration.
        values: metrics by name and configuration.
        differences: differences to the baseline by name and configuration.
        confidence: confidence level of the intervals.
        other_settings: arguments of the evaluators that differ between the runs, in words: then a difference
            may come from the evaluation.
    """

    configurations: list[Configuration]
    baseline: str
    values: dict[str, dict[str, Value]]
    differences: dict[str, dict[str, Difference]]
    confidence: float
    other_settings: list[str] = field(default_factory=list)

    @property
    def one_seed(self) -> list[str]:
        """Names of the configurations of one seed, whose seeds are not resampled."""
        return [group.name for group in self.configurations if len(group.runs) == 1]

    @property
    def resampled(self) -> dict[str, str]:
        """What the intervals of each configuration resample."""
        return {
            group.name: "test samples" if group.name in self.one_seed else "seeds and test samples"
            for group in self.configurations
        }

    @property
    def paired_by_seed(self) -> dict[str, bool]:
        """By configuration: whether it has the seeds of the baseline, several, so that they are paired."""
        seeds = {group.name: sorted(group.seeds) for group in self.configurations}
        base = seeds.pop(self.baseline)
        return {name: len(base) > 1 and own == base for name, own in seeds.items()}


def common_figures(runs: Sequence[EvaluatedRun], patterns: Sequence[str] | None = None) -> list[str]:
    """Find the metrics that every run has and that can be computed from its outcomes.

    Args:
        runs: the evaluated runs.
        patterns: regular expressions; a metric is chosen if one of them matches a part of its name. None
            chooses all metrics except those of single classes and groups.

    Returns:
        The names in the order of the first run.

    Raises:
        RunError: there is no such metric.
    """
    shared = [
        name
        for name in runs[0].figures
        if all(name in run.figures and bind_metric(name, run.outcomes) is not None for run in runs)
    ]
    if patterns is None:
        chosen = [name for name in shared if "class=" not in name and "group=" not in name]
    else:
        chosen = [name for name in shared if any(re.search(pattern, name) for pattern in patterns)]
    if not chosen:
        matching = "" if patterns is None else f" that match {list(patterns)}"
        raise RunError(
            f"the runs have no metrics in common{matching}; evaluate them with the same evaluators. "
            f"Shared by all: {', '.join(shared) or 'nothing'}"
        )
    return chosen


def compare(
    runs: Sequence[EvaluatedRun],
    baseline: EvaluatedRun | None = None,
    *,
    figures: Sequence[str] | None = None,
    bootstrap: BootstrapConfig | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare the metrics of every configuration with those of the baseline.

    Args:
        runs: two or more runs with the same test samples.
        baseline: a run of the baseline configuration; None means the first run.
        figures: regular expressions of names; see :func:`common_figures`.
        bootstrap: arguments of the intervals.
        progress: show a progress bar.

    Returns:
        The metrics and their paired differences to the baseline.

    Raises:
        RunError: there are fewer than two runs, two runs of a configuration have one seed, the test samples
            differ, the runs share no metric, or a metric is not finite.
    """
    bootstrap = bootstrap or BootstrapConfig()
    named = [*runs, *([baseline] if baseline else [])]
    all_runs = list({(run.dir.resolve(), run.part): run for run in named}.values())
    if len(all_runs) < 2:
        raise RunError(f"compare needs two or more runs, got {', '.join(str(run.dir) for run in all_runs)}")
    check_same_test_set(all_runs)
    groups = configurations(all_runs)
    for group in groups:
        _check_seeds(group)
    reference = baseline or all_runs[0]
    base = next(group.name for group in groups if reference in group.runs)
    names = common_figures(all_runs, figures)
    values: dict[str, dict[str, Value]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for name in _bar(names, progress):
        drawn: dict[str, Tensor] = {}
        values[name] = {}
        figures_of = _bound(name, all_runs)
        for group in groups:
            bound = [figures_of[run.dir, run.part] for run in group.runs]
            seeds = [figure.value() for figure in bound]
            for run, value in zip(group.runs, seeds, strict=True):
                if not isfinite(value):
                    raise RunError(f"{name} must be finite, but the outcomes of {run.dir} give {value}")
            drawn[group.name] = seed_and_sample_values(bound, bootstrap, seeds=group.seeds)
            if not drawn[group.name].isfinite().all():
                raise RunError(
                    f"{name} must be finite, but it is not on resamples of the test samples of {group.name}"
                )
            low, high = percentile_interval(drawn[group.name], bootstrap.confidence)
            spread = stdev(seeds) if len(seeds) > 1 else None
            values[name][group.name] = Value(mean(seeds), spread, low, high, seeds)
        differences[name] = {}
        for group in groups:
            if group.name != base:
                change = values[name][group.name].mean - values[name][base].mean
                interval = difference_interval(
                    drawn[group.name] - drawn[base],
                    change,
                    bootstrap.confidence,
                    least=bound[0].definition.least,
                )
                differences[name][group.name] = Difference(change, *interval)
    settings = _other_settings(all_runs, names)
    return Comparison(groups, base, values, differences, bootstrap.confidence, settings)


def _other_settings(runs: Sequence[EvaluatedRun], figures: Sequence[str]) -> list[str]:
    """The arguments of the evaluators of ``figures`` in which a run differs from the first one."""
    found: dict[str, str] = {}
    for evaluator in dict.fromkeys(name.partition("/")[0] for name in figures):
        first = _flat(evaluator, runs[0].settings.get(evaluator))
        for run in runs[1:]:
            for name, value in _flat(evaluator, run.settings.get(evaluator)).items():
                # An older version does not know all arguments.
                if name in first and first[name] != value and name.rpartition(".")[2] not in _FREE_SETTINGS:
                    of_first = f"{name} is {first[name]} in {runs[0].dir}"
                    found.setdefault(name, f"{of_first} and {value} in {run.dir}")
    return list(found.values())


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Arguments by their names with dots."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for inner, each in value.items():
        flat |= _flat(f"{name}.{inner}", each)
    return flat


def _check_seeds(group: Configuration) -> None:
    """Refuse a seed that occurs twice, because a copy of a run says nothing about other seeds."""
    first: dict[int, EvaluatedRun] = {}
    for run, seed in zip(group.runs, group.seeds, strict=True):
        if seed in first:
            raise RunError(
                f"the runs of one config must have different seeds, but {first[seed].dir} and {run.dir} both "
                f"have seed {seed}"
            )
        first[seed] = run


def _bound(name: str, runs: Sequence[EvaluatedRun]) -> dict[tuple[Path, str], BoundMetric]:
    """The metric ``name`` of each run by its folder and part, all for the same number of test samples."""
    found: dict[tuple[Path, str], BoundMetric] = {}
    for run in runs:
        metric = bind_metric(name, run.outcomes)
        assert metric is not None
        found[run.dir, run.part] = metric
        counts = [len(each.outcomes[0]) for each in found.values()]
        if counts[0] != counts[-1]:
            raise RunError(
                f"{name} must be known for the same test samples in all runs, but {runs[0].dir} has "
                f"{counts[0]} of them and {run.dir} has {counts[-1]}: choose other metrics with --figures"
            )
    return found


def _bar(names: list[str], progress: bool) -> Any:
    if not progress:
        return names
    from tqdm import tqdm

    return tqdm(names, desc="compare", leave=False, delay=2, disable=None)
