"""The stored comparison of worst-group classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from scipy import stats


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


def write_runs(runs: Path, wrong: dict[str, list[int]]) -> None:
    """Finished runs of 1,000 test images; the first ``wrong`` of the 250 in group 0 are wrong, by seed."""
    group = torch.arange(1000) % 4
    for name, counts in wrong.items():
        for seed, count in enumerate(counts):
            folder = runs / f"{name}_seed{seed}"
            (folder / "evaluation").mkdir(parents=True)
            correct = (group > 0) | (torch.arange(1000) >= 4 * count)
            save_file(
                {
                    "labels/fine": group,
                    "labels/coarse": group // 2,
                    "worst_group/trained/correct": correct,
                    "worst_group/trained/group": group.clone(),
                },
                folder / "evaluation" / "outcomes.safetensors",
            )
            values = {"accuracy": 1 - count / 1000, "worst_group_accuracy": 1 - count / 250}
            metrics = {f"worst_group/trained/{key}": {"value": value} for key, value in values.items()}
            (folder / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": metrics}))
            (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))
            (folder / "seconds.json").write_text(json.dumps({"train": 1.0, "all": 1.0}))
            line = {"epoch": 1, "val_worst_group": 0.5}
            (folder / "log.jsonl").write_text(json.dumps(line) + "\n")


def test_the_intervals_resample_seeds_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.papers import worst_group

    monkeypatch.setattr(worst_group, "SOURCES", {})
    counts = [20, 120, 60, 180, 40, 140, 100, 80]
    less = [10, 90, 20, 150, -10, 130, 40, 70]
    fewer = [count - change for count, change in zip(counts, less, strict=True)]
    write_runs(tmp_path, dict.fromkeys(worst_group.CLASSIFIERS, counts) | {"group_dro_thanos": fewer})
    results = worst_group.collect(range(8), tmp_path)
    worst = results["classifiers"]["erm"]["worst_group_accuracy"]
    low, high = stats.t.interval(0.95, 7, worst["mean"], stats.sem([1 - count / 250 for count in counts]))
    assert worst["high"] - worst["low"] > 0.9 * (high - low)
    change = results["classifiers"]["group_dro_thanos"]["worst_group_accuracy"]["above_erm"]
    low, high = stats.t.interval(0.95, 7, 62.5 / 250, stats.sem([change / 250 for change in less]))
    assert change["value"] == pytest.approx(62.5 / 250)
    assert (change["low"], change["high"]) == pytest.approx((low, high), abs=0.3 * (high - low))
    same = results["classifiers"]["group_dro_annotated"]["worst_group_accuracy"]["above_erm"]
    assert (same["low"], same["high"]) == pytest.approx((0, 0))
    assert "interval over the seeds and test images, paired" in worst_group.table(results)
    one = worst_group.table(worst_group.collect([0], tmp_path))
    assert "interval over the test images, paired" in one
    assert "One seed: the interval says nothing about other seeds." in one
