"""Another evaluation of a run: what is kept of the earlier one, replaced, or put aside."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.quick_run import train_quickly
from safetensors.torch import load_file, save_file

from pysupcon.__main__ import main
from pysupcon.errors import RunError
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluators import (
    BootstrapConfig,
    EvaluationConfig,
    FeatureSplits,
    KNNConfig,
    LinearProbeConfig,
    ProjectionConfig,
)
from pysupcon.reports.report import Report

BOTH = EvaluationConfig(
    evaluators=["knn", "geometry"],
    knn=KNNConfig(k=[1, 5]),
    projection=ProjectionConfig(method="pca"),
    bootstrap=BootstrapConfig(resamples=50),
    progress=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_quickly(tmp_path_factory.mktemp("trained") / "run")
    evaluate_run(folder, BOTH)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def stored(run_dir: Path, folder: str = "evaluation") -> Report:
    return Report.from_json((run_dir / folder / "metrics.json").read_text())


def test_results_of_other_evaluators_are_kept(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, outcomes = stored(run_dir), load_file(run_dir / "evaluation/outcomes.safetensors")
    arguments = "--evaluators knn --knn.k 5 --knn.temperature 0.5 --projection.method pca --progress false"
    assert main(["evaluate", str(run_dir), *arguments.split(), "--bootstrap.resamples", "50"]) == 0
    after = stored(run_dir)
    geometry = {name: value for name, value in before.metrics.items() if name.startswith("geometry/")}
    assert len(geometry) > 5
    assert {name: after.metrics[name] for name in geometry} == geometry
    # What runs again replaces all that it gave before.
    assert set(after.metrics) - set(geometry) == {"knn/k=5/fine/accuracy", "knn/k=5/coarse/accuracy"}
    assert after.metadata["arguments"]["knn"]["temperature"] == 0.5
    assert after.metadata["kept"]["geometry"]["arguments"] == before.metadata["arguments"]["geometry"]
    assert after.metadata["kept"]["geometry"]["versions"] == before.metadata["versions"]
    printed = capsys.readouterr().out
    assert "note: kept from an earlier evaluation of these weights: geometry" in printed
    assert "kept from an earlier" in (run_dir / "evaluation/report.md").read_text()
    assert [name for name in before.metrics if name in after.metrics] == list(after.metrics)
    # Then the other way round: the outcomes of k-NN stay, with the picture that shows them.
    kept = load_file(run_dir / "evaluation/outcomes.safetensors")
    again = evaluate_run(run_dir, replace(BOTH, evaluators=["geometry"]))
    assert set(again.metrics) == set(after.metrics)
    final = load_file(run_dir / "evaluation/outcomes.safetensors")
    assert set(final) == set(kept) < set(outcomes)
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert (run_dir / "evaluation/confusion_fine.png").exists()
    assert again.metadata["kept"]["knn"]["arguments"]["temperature"] == 0.5
    assert not list(run_dir.glob("evaluation-*"))


def test_kept_metrics_get_the_intervals_of_the_new_report(run_dir: Path) -> None:
    before = stored(run_dir).metrics["knn/k=1/fine/accuracy"]
    narrow = replace(BOTH, evaluators=["geometry"], bootstrap=BootstrapConfig(resamples=50, confidence=0.5))
    after = evaluate_run(run_dir, narrow).metrics["knn/k=1/fine/accuracy"]
    assert after.value == before.value
    assert None not in (before.low, before.high, after.low, after.high)
    assert before.low < after.low <= after.high < before.high  # type: ignore[operator]


def test_results_of_other_weights_are_put_aside(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "evaluation/metrics.json").read_bytes()
    weights = load_file(run_dir / "model.safetensors")
    save_file({name: 1.5 * value if value.is_floating_point() else value for name, value in weights.items()},
              run_dir / "model.safetensors")  # fmt: skip
    report = evaluate_run(run_dir, replace(BOTH, evaluators=["geometry"]))
    assert all(name.startswith("geometry/") for name in report.metrics)
    assert (run_dir / "evaluation-1/metrics.json").read_bytes() == before
    assert any("is in evaluation-1" in note for note in report.notes)
    assert "kept" not in report.metadata
    # The new one is of these weights: it is merged, and nothing is put aside.
    assert set(evaluate_run(run_dir, replace(BOTH, evaluators=["knn"])).metrics) > set(report.metrics)
    assert not (run_dir / "evaluation-2").exists()


@pytest.mark.parametrize("damage", ["metrics", "outcomes", "missing outcomes"])
def test_a_damaged_evaluation_is_put_aside(run_dir: Path, damage: str) -> None:
    folder = run_dir / "evaluation"
    if damage == "metrics":
        (folder / "metrics.json").write_text("{}")
    elif damage == "outcomes":  # as after a kill between the renames of the files
        outcomes = load_file(folder / "outcomes.safetensors")
        save_file(
            {name: values.flip(0) for name, values in outcomes.items()}, folder / "outcomes.safetensors"
        )
    else:
        (folder / "outcomes.safetensors").unlink()
    report = evaluate_run(run_dir, replace(BOTH, evaluators=["geometry"]))
    assert all(name.startswith("geometry/") for name in report.metrics)
    assert (run_dir / "evaluation-1/report.md").exists()
    assert stored(run_dir).metrics == report.metrics


def test_an_evaluation_that_was_killed_before_its_end_is_overwritten(run_dir: Path) -> None:
    (run_dir / "evaluation/metrics.json").unlink()
    report = evaluate_run(run_dir, replace(BOTH, evaluators=["geometry"]))
    assert all(name.startswith("geometry/") for name in report.metrics)
    assert not list(run_dir.glob("evaluation-*"))


def test_no_pictures(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of the earlier evaluation are gone, and matplotlib is not needed."""
    import sys

    assert (run_dir / "evaluation/embedding.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = evaluate_run(run_dir, replace(BOTH, pictures=False))
    assert not list((run_dir / "evaluation").glob("*.png"))
    assert report.pictures == []
    assert "<img" not in (run_dir / "evaluation/report.html").read_text()


def test_a_penalty_at_the_end_of_its_range_is_named(run_dir: Path) -> None:
    strong = replace(BOTH, evaluators=["linear_probe"], linear_probe=LinearProbeConfig(penalties=[1e3, 1e2]))
    notes = evaluate_run(run_dir, strong).notes
    assert any("linear_probe/coarse: the smallest L2 penalty, 100, had the best" in note for note in notes)
    wide = replace(strong, linear_probe=LinearProbeConfig(penalties=[1e3, 1e2, 1e-3, 1e-9]))
    assert not any("smallest L2 penalty" in note for note in evaluate_run(run_dir, wide).notes)
    one = replace(strong, linear_probe=LinearProbeConfig(penalties=[1e3]))
    assert not any("smallest L2 penalty" in note for note in evaluate_run(run_dir, one).notes)


def test_left_out_neighbours_are_named(run_dir: Path) -> None:
    config = replace(BOTH, evaluators=["knn"], knn=KNNConfig(k=[1, 700, 5000]))
    report = evaluate_run(run_dir, config)
    assert "knn: k = 700, 5000 left out: above half of the 1295 training samples" in report.notes
    assert {name.split("/")[1] for name in report.metrics if name.startswith("knn/")} == {"k=1"}
    later = evaluate_run(run_dir, BOTH, evaluators="geometry")
    assert [note for note in later.notes if note.startswith("knn: ")] == report.notes[:1]


def test_a_failing_evaluator_loses_nothing_else(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are written, the failure is named, and earlier results of the same name stay."""

    class Own:
        name = "own"

        def __init__(self, value: float | None) -> None:
            self.value = value

        def __call__(self, splits: FeatureSplits) -> dict[str, float]:
            return {"number": 1 / self.value} if self.value is not None else {}["none"]

    evaluate_run(run_dir, BOTH, evaluators=Own(4.0))
    with pytest.raises(
        RunError, match=r"Own failed: KeyError: 'none'; the results of the other .* are in .*evaluation$"
    ):
        evaluate_run(run_dir, BOTH, evaluators=[Own(None), "geometry"])
    report = stored(run_dir)
    assert report.metrics["own/number"].value == 0.25
    assert {name.partition("/")[0] for name in report.metrics} == {"knn", "geometry", "own"}
    assert "own" in report.metadata["kept"]
    assert "Own failed: KeyError" in report.warnings[0]
    assert "KeyError: 'none'" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"Own failed: KeyError: 'none'$"):
        evaluate_run(run_dir, BOTH, evaluators=Own(None))
    assert stored(run_dir) == report


def test_evaluators_of_a_call_replace_those_of_the_config(run_dir: Path) -> None:
    report = evaluate_run(run_dir, BOTH, evaluators="geometry")
    assert "knn" in report.metadata["kept"]
    assert report.metadata["arguments"]["evaluators"] == ["geometry"]


def test_the_summary_shows_what_ran(run_dir: Path) -> None:
    """Not what was kept, and a line of each evaluator before a second one."""

    def own(splits: FeatureSplits) -> dict[str, float]:
        return {f"number {i}": i for i in range(5)}

    alone = evaluate_run(run_dir, BOTH, evaluators=own).summary().splitlines()
    assert [line.split("/")[0].strip() for line in alone[1:-1]] == ["own"] * 5
    full = EvaluationConfig(progress=False, pictures=False, bootstrap=BootstrapConfig(resamples=20))
    every = [*full.evaluators, "linear_probe", own]
    lines = evaluate_run(run_dir, full, evaluators=every).summary(12).splitlines()
    assert len(lines) <= 12
    assert {line.split("/")[0].strip() for line in lines if "/" in line} >= {
        *full.evaluators,
        "linear_probe",
        "own",
    }


def test_intervals_of_the_user_are_dropped_at_another_confidence(run_dir: Path) -> None:
    def own(splits: FeatureSplits) -> dict[str, float]:
        return {"x": 1.0, "x/low": 0.5, "x/high": 1.5}

    assert evaluate_run(run_dir, BOTH, evaluators=own).metrics["own/x"].low == 0.5
    other = replace(BOTH, evaluators=["geometry"], bootstrap=BootstrapConfig(resamples=20, confidence=0.5))
    kept = evaluate_run(run_dir, other).metrics["own/x"]
    assert (kept.value, kept.low, kept.high) == (1.0, None, None)
