"""The stored comparison of worst-group classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_stored_comparison_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/results/worst_group.json: summaries are those of the seeds, and the table prints them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.papers import worst_group

    results = json.loads(worst_group.RESULTS.read_text())
    classifiers = results["classifiers"]
    assert set(classifiers) == set(worst_group.CLASSIFIERS)
    means = {}
    for name, entry in classifiers.items():
        assert list(entry["seeds"]) == ["0", "1", "2"]
        for figures in entry["seeds"].values():
            by_group = [figures[f"group={g}/accuracy"] for g in range(4)]
            assert figures["worst_group_accuracy"] == min(by_group)
            assert figures["accuracy"] == pytest.approx(sum(by_group) / 4)  # groups of one size
        summary = entry["worst_group_accuracy"]
        means[name] = sum(f["worst_group_accuracy"] for f in entry["seeds"].values()) / 3
        assert summary["mean"] == pytest.approx(means[name])
        assert summary["low"] <= summary["mean"] <= summary["high"]
    shown = worst_group.table(results)
    for name, entry in classifiers.items():
        change = entry["worst_group_accuracy"]["above_erm"]
        assert change["value"] == pytest.approx(means[name] - means["erm"])
        assert f"| {entry['title']} | {100 * entry['accuracy']['mean']:.1f} ± " in shown
        assert (f"| {100 * change['value']:+.1f} [" in shown) == (name != "erm")
