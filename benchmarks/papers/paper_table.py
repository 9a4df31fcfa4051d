"""Renders the results in benchmarks/papers/README.md from what paper_results.py stored, between two markers.

python benchmarks/papers/paper_table.py            # write them, and the pictures
python benchmarks/papers/paper_table.py --check    # exit status 1 if the page differs from the results
python benchmarks/papers/paper_table.py --print    # Markdown on standard output
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.papers import paper_goals, paper_plot
from benchmarks.papers.paper_runs import TABLES
from benchmarks.table import between_markers, markdown

BEGIN = "<!-- papers:begin -->"
END = "<!-- papers:end -->"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "papers" / "README.md"
HEADINGS = {
    "mnist5k_none": "MNIST-coarse, 3,600 images, no augmentation: some losses let classes collapse",
    "mnist5k_strong": "MNIST-coarse, strong augmentation",
    "fashion_mnist_none": "Fashion-MNIST-coarse, 5,000 images, no augmentation",
    "fashion_mnist_strong": "Fashion-MNIST-coarse, strong augmentation",
    "mnist5k_fine": "Margin of medians, trained on the ten digits",
    "mnist5k_moco": "Labelled MoCo: a momentum encoder, with and without a queue, ten digits, batches of 50",
    "mnist5k_alpha": "The weight of cNCE, MNIST-coarse without augmentation",
}
COLUMNS = {
    "coarse": ("coarse labels, linear probe", 100),
    "probe": ("fine labels, linear probe", 100),
    "logistic": ("fine labels, logistic regression", 100),
    "knn": ("fine labels, 1-NN", 100),
    "margin": ("margin of medians, fine", 1),
    "spread": ("spread", 1),
}
"""Key in the results -> heading and factor."""
MARGIN_TABLE = ("mnist5k_fine",)


def render(results: Mapping[str, Any]) -> str:
    """One table of paper_results.py as Markdown."""
    name = results["table"]
    shown = ("margin", "knn") if name in MARGIN_TABLE else ("coarse", "probe", "logistic", "knn", "spread")
    differs = "margin" if name in MARGIN_TABLE else "probe"
    base = next(row["method"] for row in results["rows"] if row["baseline"])
    header = ["method", *(COLUMNS[key][0] for key in shown)]
    header += [f"{COLUMNS[differs][0]}, less {base} [interval]", "minutes"]
    lines = [header]
    for row in results["rows"]:
        runs = [results["runs"][run] for run in row["runs"]]
        cells = [_over_seeds([run[key]["value"] for run in runs], COLUMNS[key][1]) for key in shown]
        lines.append([row["method"], *cells, _difference(row, differs), _minutes(runs)])
    return "\n\n".join([f"**{HEADINGS[name]}** ({_seeds(results['seeds'])}).", markdown(lines)])


def _over_seeds(values: Sequence[float], factor: float) -> str:
    mean = fsum(values) / len(values)  # Python's sum rounds otherwise from 3.12 on
    digits = 1 if factor == 100 else 3
    text = f"{factor * mean:.{digits}f}"
    if len(values) < 2:
        return text
    deviation = (fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{text} ± {factor * deviation:.{digits}f}"


def _difference(row: Mapping[str, Any], key: str) -> str:
    if row["baseline"]:
        return ""
    found, factor = row[f"{key}_difference"], COLUMNS[key][1]
    digits = 1 if factor == 100 else 3
    value, low, high = (f"{factor * found[end]:+.{digits}f}" for end in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def _minutes(runs: Sequence[Mapping[str, Any]]) -> str:
    """Processor minutes of training and evaluation, mean over the seeds."""
    total = fsum(run["train_processor_minutes"] + run["evaluate_processor_minutes"] for run in runs)
    return f"{total / len(runs):.1f}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"


def section(stored: Sequence[Mapping[str, Any]]) -> str:
    """All tables, in the order of paper_runs.py."""
    order = list(TABLES)
    stored = sorted(stored, key=lambda results: order.index(results["table"]))
    machine = stored[0]["machine"]
    parts = [
        f"{machine['processor']}, one thread per training; torch {machine['versions']['torch']}.",
        *(render(results) for results in stored),
        paper_goals.table(stored),
        "Mean over the seeds ± their standard deviation, per cent. In brackets the "
        f"{100 * stored[0]['confidence']:g} % interval of the difference over the test images (paired "
        "bootstrap); bold: the interval excludes 0. Minutes: of one processor, training and "
        "evaluation; frozen encoders were trained in the rows that they come from.",
        *_pictures(stored),
    ]
    return "\n\n".join(part for part in parts if part)


def _pictures(stored: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = []
    if any(paper_plot.transfer_rows(results) for results in stored):
        shown.append(f"![Differences to SupCon](../results/{paper_plot.DIFFERENCES_FILE})")
    if any(results["table"] == paper_plot.ALPHA_TABLE for results in stored):
        shown.append(f"![Accuracy and spread against alpha](../results/{paper_plot.ALPHA_FILE})")
    return shown


def read(folder: Path) -> list[dict[str, Any]]:
    """What paper_results.py stored in a folder.

    Raises:
        ValueError: nothing, or of a table that paper_runs.py does not know.
    """
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("paper_*.json"))]
    unknown = [results["table"] for results in stored if results["table"] not in TABLES]
    if unknown or not stored:
        raise ValueError(f"{folder}: no results of paper_results.py" + (f": {unknown}" if unknown else ""))
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of paper_*.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file that holds the markers")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the page is out of date"
    )
    parser.add_argument("--print", action="store_true", help="change nothing; print the section")
    options = parser.parse_args(arguments)
    try:
        stored = read(options.results)
        text = section(stored)
        if options.print:
            print(text)
            return 0
        page = options.page.read_text(encoding="utf-8")
        new = between_markers(page, BEGIN, END, text)
    except (OSError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != page:
            message = f"{options.page} does not show the stored results; run benchmarks/papers/paper_table.py"
            print(message, file=sys.stderr)
        return int(new != page)
    options.page.write_text(new, encoding="utf-8")
    paper_plot.draw(stored, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
