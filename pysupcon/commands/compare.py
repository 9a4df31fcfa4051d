"""``pysupcon compare RUN RUN ...``: compare evaluated runs on the same test samples.

Runs whose configs differ only in the seed form one configuration. Its metrics are means over the seeds, and
the table shows the standard deviation over the seeds. Confidence intervals of differences come from a paired
bootstrap: every run is resampled with the same test samples.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from pysupcon.commands import plain_parser, program
from pysupcon.errors import RunError
from pysupcon.evaluators import BootstrapConfig, bind_metric, unit_of
from pysupcon.evaluators.bootstrap import bootstrap_values, percentile_interval
from pysupcon.reports.evaluated_runs import (
    EVALUATION,
    Configuration,
    EvaluatedRun,
    check_same_test_set,
    configurations,
    read_run,
)
from pysupcon.reports.report import Markdown, markdown_table

TABLE_FILE = "compare.md"
JSON_FILE = "compare.json"
HEADLINES = (
    "coarse_to_fine/fine/accuracy",
    "coarse_to_fine/fine_within_coarse/accuracy",
    "coarse_to_fine/coarse/accuracy",
    "linear_probe/fine/accuracy",
    "linear_probe/coarse/accuracy",
    "knn/k=1/fine/accuracy",
    "separation/fine/margin",
    "separation/coarse/margin",
    "worst_group/erm/worst_group_accuracy",
    "worst_group/dro_inferred/worst_group_accuracy",
    "worst_group/dro_true/worst_group_accuracy",
    "transfer/accuracy",
)


@dataclass(frozen=True)
class Value:
    """A metric of one configuration.

    Attributes:
        mean: mean over the seeds.
        spread: standard deviation over the seeds, None for one seed.
        low, high: bootstrap percentile interval of the mean over the test samples.
        seeds: the metric of each run.
    """

    mean: float
    spread: float | None
    low: float
    high: float
    seeds: list[float]


@dataclass(frozen=True)
class Difference:
    """A metric of one configuration minus that of the baseline, with its paired bootstrap interval."""

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
    """

    configurations: list[Configuration]
    baseline: str
    values: dict[str, dict[str, Value]]
    differences: dict[str, dict[str, Difference]]
    confidence: float


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
        RunError: there are fewer than two runs, their test samples differ, they share no metric, or a metric
            is not finite.
    """
    bootstrap = bootstrap or BootstrapConfig()
    named = [*runs, *([baseline] if baseline else [])]
    all_runs = list({(run.dir.resolve(), run.part): run for run in named}.values())
    if len(all_runs) < 2:
        raise RunError(f"compare needs two or more runs, got {', '.join(str(run.dir) for run in all_runs)}")
    check_same_test_set(all_runs)
    groups = configurations(all_runs)
    reference = baseline or all_runs[0]
    base = next(group.name for group in groups if reference in group.runs)
    names = common_figures(all_runs, figures)
    values: dict[str, dict[str, Value]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for name in _bar(names, progress):
        drawn: dict[str, Tensor] = {}
        values[name] = {}
        for group in groups:
            samples = []
            seeds = []
            for run in group.runs:
                figure = bind_metric(name, run.outcomes)
                assert figure is not None
                samples.append(bootstrap_values(figure, bootstrap))
                seeds.append(figure.value())
                if not isfinite(seeds[-1]) or not samples[-1].isfinite().all():
                    raise RunError(f"{name} must be finite, but the outcomes of {run.dir} give {seeds[-1]}")
            drawn[group.name] = torch.stack(samples).mean(dim=0)
            low, high = percentile_interval(drawn[group.name], bootstrap.confidence)
            spread = stdev(seeds) if len(seeds) > 1 else None
            values[name][group.name] = Value(mean(seeds), spread, low, high, seeds)
        differences[name] = {}
        for group in groups:
            if group.name != base:
                interval = percentile_interval(drawn[group.name] - drawn[base], bootstrap.confidence)
                change = values[name][group.name].mean - values[name][base].mean
                differences[name][group.name] = Difference(change, *interval)
    return Comparison(groups, base, values, differences, bootstrap.confidence)


def _bar(names: list[str], progress: bool) -> Any:
    if not progress:
        return names
    from tqdm import tqdm

    return tqdm(names, desc="compare", leave=False, delay=2, disable=None)


def _show(value: float, unit: str, *, sign: bool = False) -> str:
    text = f"{100 * value:.2f}" if unit == "fraction" else f"{value:.4g}"
    return f"+{text}" if sign and value > 0 else text


def _value_cell(value: Value, unit: str) -> str:
    text = _show(value.mean, unit)
    return text if value.spread is None else f"{text} ± {_show(value.spread, unit)}"


def _difference_cell(difference: Difference, unit: str) -> str:
    low, high = _show(difference.low, unit, sign=True), _show(difference.high, unit, sign=True)
    text = f"{_show(difference.value, unit, sign=True)} [{low}, {high}]"
    return Markdown(f"**{text}**" if difference.significant else text)


def _heading(name: str) -> str:
    unit = unit_of(name)
    shown = "%" if unit == "fraction" else unit
    return f"{name} ({shown})" if shown else name


def to_markdown(comparison: Comparison) -> str:
    """Return the tables: headline metrics by configuration, then every metric with its differences."""
    headlines = [name for name in HEADLINES if name in comparison.values] or list(comparison.values)[:6]
    lines = ["# Comparison", ""]
    rows = [
        (
            f"{group.name}{' (baseline)' if group.name == comparison.baseline else ''}",
            str(len(group.runs)),
            *(_value_cell(comparison.values[name][group.name], unit_of(name)) for name in headlines),
        )
        for group in comparison.configurations
    ]
    lines += markdown_table(("configuration", "seeds", *map(_heading, headlines)), rows)
    lines += ["", "Mean over the seeds ± their standard deviation.", "", "## Differences", ""]
    others = [group.name for group in comparison.configurations if group.name != comparison.baseline]
    if others:
        rows = [
            (
                _heading(name),
                _value_cell(comparison.values[name][comparison.baseline], unit_of(name)),
                *(_difference_cell(comparison.differences[name][other], unit_of(name)) for other in others),
            )
            for name in comparison.values
        ]
        header = ("metric", comparison.baseline, *(f"{o} - {comparison.baseline}" for o in others))
        lines += markdown_table(header, rows)
        lines += [
            "",
            f"Difference of the means over the seeds, with its {100 * comparison.confidence:g} % percentile "
            "interval over the test samples (paired bootstrap). Bold: the interval excludes 0.",
            "",
        ]
    else:
        lines += ["There is only one configuration: its seeds are averaged, and nothing is compared.", ""]
    lines += ["## Runs", ""]
    members = ((group.name, ", ".join(run.name for run in group.runs)) for group in comparison.configurations)
    lines += [*markdown_table(("configuration", "runs"), members), ""]
    return "\n".join(lines)


def to_json(comparison: Comparison) -> str:
    """Return everything as JSON in full precision, sorted by name."""
    content = {
        "schema": 1,
        "baseline": comparison.baseline,
        "confidence": comparison.confidence,
        "configurations": {
            group.name: [run.name for run in group.runs] for group in comparison.configurations
        },
        "values": {
            name: {other: vars(value) for other, value in values.items()}
            for name, values in comparison.values.items()
        },
        "differences": {
            name: {other: vars(value) for other, value in values.items()}
            for name, values in comparison.differences.items()
        },
        "units": {name: unit_of(name) for name in comparison.values},
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.json, compare.md and one picture of the differences per unit into ``folder``.

    Returns:
        The paths of the files.
    """
    from pysupcon.reports.charts import draw_differences

    folder.mkdir(parents=True, exist_ok=True)
    markdown = to_markdown(comparison)
    by_unit: dict[str, list[tuple[str, str, float, float, float]]] = {}
    for name, differences in comparison.differences.items():
        unit = unit_of(name)
        scale = 100 if unit == "fraction" else 1
        for other, found in differences.items():
            row = (name, other, scale * found.value, scale * found.low, scale * found.high)
            by_unit.setdefault("percentage points" if unit == "fraction" else unit, []).append(row)
    written = []
    for unit, rows in by_unit.items():
        path = folder / f"differences_{re.sub(r'[^a-z]+', '_', unit.lower())}.png"
        draw_differences(path, rows, title=f"Difference to {comparison.baseline}", unit=unit)
        markdown += f"\n![Differences in {unit}]({path.name})\n"
        written.append(path)
    (folder / TABLE_FILE).write_text(markdown, encoding="utf-8")
    (folder / JSON_FILE).write_text(to_json(comparison), encoding="utf-8")
    return [folder / TABLE_FILE, folder / JSON_FILE, *written]


def main(arguments: Sequence[str]) -> int:
    """Print the tables and write them to files; return the exit status."""

    parser = plain_parser(
        prog=f"{program()} compare",
        description="Compare evaluated runs: differences with paired bootstrap intervals, means over seeds.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of an evaluated run; RUN/evaluation-projection: its projections",
    )
    add("--baseline", metavar="RUN", help="run of the baseline configuration (default: the first run)")
    add(
        "--of",
        default=EVALUATION,
        metavar="PART",
        help="results to compare: %(default)s, evaluation-projection, or transfer/NAME",
    )
    add("--output", default="comparison", help="folder of the results (default: %(default)s)")
    add("--figures", nargs="+", metavar="REGEX", help="metrics to compare (default: all but single classes)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    add("--confidence", type=float, default=0.95, help="confidence level (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        bootstrap = BootstrapConfig(parsed.resamples, parsed.confidence, parsed.seed)
        for pattern in parsed.figures or ():
            re.compile(pattern)
        runs = [read_run(folder, parsed.of) for folder in parsed.runs]
        baseline = read_run(parsed.baseline, parsed.of) if parsed.baseline else None
        if baseline is not None:
            same = baseline.dir.resolve(), baseline.part
            baseline = next((run for run in runs if (run.dir.resolve(), run.part) == same), baseline)
        comparison = compare(runs, baseline, figures=parsed.figures, bootstrap=bootstrap, progress=True)
    except (RunError, ValueError, re.error) as error:
        print(f"pysupcon compare: {error}", file=sys.stderr)
        return 1
    written = write(comparison, Path(parsed.output))
    print(to_markdown(comparison))
    print("written: " + ", ".join(map(str, written)))
    return 0
