"""Plots the results of paper_results.py: differences to SupCon, and the sweep of cNCE's weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIFFERENCES_FILE = "paper_differences.png"
ALPHA_FILE = "paper_alpha.png"
ALPHA_TABLE = "mnist5k_alpha"


def draw(stored: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the plots for which there are results. Returns their paths."""
    drawn = []
    compared = [results for results in stored if any(row["baseline"] for row in transfer_rows(results))]
    if compared:
        drawn.append(folder / DIFFERENCES_FILE)
        _differences(compared, drawn[-1])
    sweep = next((results for results in stored if results["table"] == ALPHA_TABLE), None)
    if sweep is not None:
        drawn.append(folder / ALPHA_FILE)
        _alpha(sweep, drawn[-1])
    return drawn


def transfer_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a coarse-to-fine table with SupCon as the baseline; empty for other tables."""
    rows: list[Mapping[str, Any]] = results["rows"]
    base = next(row["method"] for row in rows if row["baseline"])
    return rows if base == "SupCon" and "_fine" not in results["table"] else []


def _differences(stored: Sequence[Mapping[str, Any]], path: Path) -> None:
    from pysupcon.reports.charts import draw_differences

    rows = []
    for results in stored:
        for row in transfer_rows(results):
            if not row["baseline"]:
                found = row["probe_difference"]
                ends = (100 * found[end] for end in ("value", "low", "high"))
                rows.append((results["table"].replace("_", " "), row["method"], *ends))
    draw_differences(
        path, rows, title="Coarse to fine: fine labels, linear probe, less SupCon", unit="percentage points"
    )


def _alpha(results: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = results["rows"]
    alphas = [float(row["method"].removeprefix("alpha ")) for row in rows]
    runs = [results["runs"][row["runs"][0]] for row in rows]
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="alpha: weight of cNCE; SupCon has 1 - alpha", ylabel="accuracy, %")
    for key, label, colour, marker in (
        ("probe", "fine labels, linear probe", "#3f90da", "o"),
        ("coarse", "coarse labels, linear probe", "#ffa90e", "s"),
    ):
        values = [100 * run[key]["value"] for run in runs]
        ends = [[100 * abs(run[key][end] - run[key]["value"]) for run in runs] for end in ("low", "high")]
        axes.errorbar(alphas, values, ends, label=label, color=colour, marker=marker, capsize=3)
    right = axes.twinx()
    right.set(ylabel="spread: mean distance to the class mean", ylim=(0, 1))
    spread = [run["spread"]["value"] for run in runs]
    right.plot(alphas, spread, label="spread", color="#bd1f01", marker="^", linestyle="--")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.set_title("MNIST-coarse without augmentation, 1 seed; bars: 95 % over the test images", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path)
