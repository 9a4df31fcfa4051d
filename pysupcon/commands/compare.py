"""``pysupcon compare RUN RUN ...``: compare evaluated runs on the same test samples.

Runs whose configs differ only in the seed form one configuration. Its metrics are means over the seeds, and
the table shows the standard deviation over the seeds. Confidence intervals come from a bootstrap of the seeds
and of the test samples. Differences are paired by test sample, and by seed if both configurations have the
same seeds. The tables say which configurations have one seed: their intervals say nothing about other seeds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pysupcon.commands import plain_parser, program
from pysupcon.errors import RunError
from pysupcon.evaluation.comparison import Comparison, Difference, Value, compare
from pysupcon.evaluators import BootstrapConfig, unit_of
from pysupcon.reports.evaluated_runs import EVALUATION, read_run
from pysupcon.reports.report import Markdown, escape, markdown_table

TABLE_FILE = "compare.md"
JSON_FILE = "compare.json"
ONE_SEED = "one seed: the interval says nothing about other seeds"
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


def _resampling(comparison: Comparison) -> str:
    """What the intervals of the differences resample, and how they are paired."""
    names = [group.name for group in comparison.configurations]
    alone = comparison.one_seed
    many = [escape(name) for name in names if name not in alone]
    if not alone:
        lines = ["Resampled: seeds and test samples."]
    elif many:
        lines = [f"Resampled: test samples, and the seeds of {', '.join(many)}."]
    else:
        lines = ["Resampled: test samples."]
    lines.append("Paired by test sample.")
    paired = comparison.paired_by_seed
    several = {name: same for name, same in paired.items() if name not in alone}
    if comparison.baseline not in alone and several:
        other = [escape(name) for name, same in several.items() if not same]
        if len(other) < len(several):
            lines[-1] = "Paired by test sample and by seed."
        if other:
            lines.append(
                f"Not paired by seed, because the seeds are not those of {escape(comparison.baseline)}: "
                f"{', '.join(other)}."
            )
    return " ".join(lines)


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
            f"Difference of the means over the seeds, with its {100 * comparison.confidence:g} % interval "
            f"(bootstrap). Bold: the interval excludes 0. {_resampling(comparison)}",
            "",
        ]
        if comparison.one_seed:
            lines += [f"Warning, {ONE_SEED}: {', '.join(map(escape, comparison.one_seed))}", ""]
        if comparison.other_settings:
            told = "; ".join(map(escape, comparison.other_settings))
            lines += [f"Warning, the runs were not evaluated with the same settings: {told}", ""]
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
        "resampled": comparison.resampled,
        "paired_by_seed": comparison.paired_by_seed,
        "other_settings": comparison.other_settings,
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
        title = f"Difference to {comparison.baseline}"
        draw_differences(path, rows, title=title, unit=unit, note=_note(comparison))
        markdown += f"\n![Differences in {unit}]({path.name})\n"
        written.append(path)
    (folder / TABLE_FILE).write_text(markdown, encoding="utf-8")
    (folder / JSON_FILE).write_text(to_json(comparison), encoding="utf-8")
    return [folder / TABLE_FILE, folder / JSON_FILE, *written]


def _note(comparison: Comparison) -> str:
    """What the intervals of the picture resample."""
    level = f"{100 * comparison.confidence:g} % intervals"
    if not comparison.one_seed:
        return f"{level} over seeds and test samples"
    if len(comparison.one_seed) == len(comparison.configurations):
        return f"{level} over test samples; {ONE_SEED}"
    return f"{level} over test samples, and over seeds except {', '.join(comparison.one_seed)} ({ONE_SEED})"


def main(arguments: Sequence[str]) -> int:
    """Print the tables and write them to files; return the exit status."""

    parser = plain_parser(
        prog=f"{program()} compare",
        description="Compare evaluated runs: means over seeds, and paired differences with bootstrap "
        "intervals over seeds and test samples (one seed: over test samples only).",
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
