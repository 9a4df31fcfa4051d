"""Compares the results of paper_results.py with the claims of the two papers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from typing import Any, NamedTuple

from benchmarks.table import markdown

LIFT = 0.111
"""Chen et al. 2022: fine accuracy of Thanos minus that of SupCon, mean over five data sets."""
THANOS = "Thanos, two frozen backbones"
BOUND = "SupCon + cNCE, spectral normalisation"
Results = Mapping[str, Any]


class Goal(NamedTuple):
    """A claim, the measured and the required value, and whether the claim holds."""

    claim: str
    measured: str
    wanted: str
    met: bool


def goals(stored: Sequence[Results]) -> list[Goal]:
    """The claims for which the stored tables have results."""
    transfers = [results for results in stored if _row(results, THANOS) is not None]
    collapsing = [results for results in transfers if results["regime"] == "none"]
    return [
        *_lift(collapsing),
        *(goal for results in collapsing for goal in _order(results)),
        *(goal for results in transfers if results["regime"] == "strong" for goal in _never_below(results)),
        *(goal for results in stored for goal in _margin(results)),
    ]


def table(stored: Sequence[Results]) -> str:
    """The goals as a Markdown table; empty if there are none."""
    found = goals(stored)
    if not found:
        return ""
    lines = [["claim", "measured", "wanted", ""]]
    lines += [[goal.claim, goal.measured, goal.wanted, "met" if goal.met else "MISSED"] for goal in found]
    return markdown(lines)


def _row(results: Results, method: str) -> Mapping[str, Any] | None:
    return next((row for row in results["rows"] if row["method"] == method), None)


def _lift(collapsing: Sequence[Results]) -> Iterator[Goal]:
    lifts = [row["probe_difference"]["value"] for results in collapsing if (row := _row(results, THANOS))]
    if lifts:
        mean = fsum(lifts) / len(lifts)
        claim = f"Thanos less SupCon, no augmentation, mean over {len(lifts)} data set(s)"
        yield Goal(claim, f"{100 * mean:+.1f} points", f">= {100 * LIFT:.1f}", mean >= LIFT)


def _order(results: Results) -> Iterator[Goal]:
    """SupCon < SupCon + cNCE < Thanos, if the classes collapse."""
    middle = BOUND if _row(results, BOUND) else "SupCon + cNCE"
    row = _row(results, middle)
    if row is None:
        return
    yield _above(f"{middle} less SupCon, {results['table']}", row["probe_difference"])
    for order in results["orders"]:
        if (order["method"], order["less"]) == (THANOS, middle):
            yield _above(f"Thanos less {middle}, {results['table']}", order)


def _above(claim: str, difference: Mapping[str, Any]) -> Goal:
    return Goal(claim, _points(difference), "interval above 0", difference["low"] > 0)


def _never_below(results: Results) -> Iterator[Goal]:
    row = _row(results, THANOS)
    assert row is not None
    difference = row["probe_difference"]
    claim = f"Thanos less SupCon, {results['table']}"
    yield Goal(claim, _points(difference), "not below 0 beyond the interval", difference["high"] >= 0)


def _margin(results: Results) -> Iterator[Goal]:
    """SINCERE above SupCon, both at the same temperature, and each at the temperature of its paper."""
    base = next(row["method"] for row in results["rows"] if row["baseline"])
    found = [
        {"method": row["method"], "less": base, **row["margin_difference"]}
        for row in results["rows"]
        if "margin_difference" in row
    ]
    for difference in [*found, *(order for order in results["orders"] if order["figure"] == "margin")]:
        if difference["method"].startswith("SINCERE") and difference["less"].startswith("SupCon"):
            value, low, high = (f"{difference[end]:+.3f}" for end in ("value", "low", "high"))
            claim = f"margin of medians, {difference['method']}, less {difference['less']}"
            yield Goal(claim, f"{value} [{low}, {high}]", "interval above 0", difference["low"] > 0)


def _points(difference: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * difference[end]:+.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}] points"
