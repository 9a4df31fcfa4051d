"""benchmarks/papers: the jobs, resuming a stopped command, and tables that agree with the runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.papers import paper_goals, paper_plot, paper_results, paper_runs, paper_table
from benchmarks.papers.paper_runs import Job, Method, Table
from pysupcon.config import parse_args

RECIPE = """
data: {dataset: digits, augmentation: none, batch_size: 128}
model: {width: 4}
trainer: {epochs: 2, checkpoint_epochs: 2, best_by: null}
optimizer: {learning_rate: 5.0e-3}
evaluation:
  evaluators: [coarse_to_fine, linear_probe, knn, geometry, separation]
  coarse_to_fine: {solver: adamw, epochs: 3}
  linear_probe: {level: fine, penalties: [1.0e-2]}
  separation: {per_class: false}
  projection: {method: pca}
  bootstrap: {resamples: 50}
"""
CROSS_ENTROPY = (
    "config: recipe.yaml\nmodel: {classifier: true}\nloss: {name: none, cross_entropy_weight: 1}\n"
)
METHODS = (
    Method("ce", "cross-entropy"),
    Method("supcon", "SupCon"),
    Method("both", "two frozen backbones", parts=("supcon", "ce")),
)
TABLE = Table("mnist5k_none", "digits", "none", METHODS, seeds=(0,))


@pytest.fixture(scope="module", name="runs")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs of TABLE, trained in this process."""
    folder = tmp_path_factory.mktemp("paper")
    configs = {"recipe": RECIPE, "digits_supcon": "config: recipe.yaml\n", "digits_ce": CROSS_ENTROPY}
    for name, text in configs.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_runs, "CONFIGS", folder)
        patch.setattr(
            "pysupcon.evaluation.pictures.draw_pictures", lambda *_: ([], [])
        )  # takes longer than all the rest
        for method in METHODS:
            job = Job(TABLE, method, 0)
            assert not paper_results.finished(job, folder)
            arguments = job.arguments(folder / TABLE.name / job.name)
            assert paper_results.run_job(job, folder, arguments) == job.key
            assert paper_results.finished(job, folder)
    return folder


@pytest.fixture(name="results")
def collected(runs: Path) -> dict[str, Any]:
    """The stored results of paper_results.py, without the machine."""
    found = paper_results.collect(TABLE, runs)
    assert found is not None
    return found


def test_what_is_finished_is_not_trained_again(runs: Path) -> None:
    jobs = [Job(TABLE, method, 0) for method in METHODS]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert paper_results.train_all(jobs, runs, {}, 2) == []
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_a_job_whose_needs_failed_is_named(tmp_path: Path) -> None:
    assert paper_results.train_all([Job(TABLE, METHODS[2], 7)], tmp_path, {}, 1) == [
        "mnist5k_none/both_seed7"
    ]


def test_results_are_those_of_the_runs(runs: Path, results: dict[str, Any]) -> None:
    assert [row["method"] for row in results["rows"]] == [method.title for method in METHODS]
    assert (results["seeds"], [row["baseline"] for row in results["rows"]]) == ([0], [False, True, False])
    for row in results["rows"]:
        (name,) = row["runs"]
        report = json.loads((runs / TABLE.name / name / "evaluation" / "metrics.json").read_text())
        metric = report["metrics"]["coarse_to_fine/fine/accuracy"]
        figures = results["runs"][name]
        assert row["probe"]["mean"] == figures["probe"]["value"] == metric["value"]
        assert figures["probe"]["low"] == metric["low"] < metric["high"] == figures["probe"]["high"]
        assert 0 < figures["spread"]["value"] <= 1
        assert figures["train_processor_minutes"] > 0
    one, base, _ = results["rows"]
    difference = one["probe_difference"]
    assert difference["value"] == pytest.approx(one["probe"]["mean"] - base["probe"]["mean"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert "probe_difference" not in base


def test_without_the_baseline_there_are_no_results(runs: Path, tmp_path: Path) -> None:
    assert paper_results.collect(TABLE, tmp_path) is None
    (tmp_path / TABLE.name).mkdir()
    (tmp_path / TABLE.name / "ce_seed0").symlink_to(runs / TABLE.name / "ce_seed0")
    assert paper_results.collect(TABLE, tmp_path) is None


def with_machine(results: dict[str, Any], folder: Path) -> None:
    machine = {"device": "cpu", "processor": "some", "backends": {"cpu": {}}, "versions": {"torch": "2.x"}}
    stored = json.dumps({"machine": machine, **results})
    (folder / "paper_mnist5k_none.json").write_text(stored, encoding="utf-8")


def test_readme_shows_the_results(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_machine(results, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{paper_table.BEGIN}\nformer\n{paper_table.END}\nbelow\n", encoding="utf-8")
    where = ["--results", str(tmp_path), "--page", str(readme)]
    assert paper_table.main([*where, "--check"]) == 1
    assert "run benchmarks/papers/paper_table.py" in capsys.readouterr().err
    assert paper_table.main(where) == 0
    assert paper_table.main([*where, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "former" not in text
    row = next(line for line in text.splitlines() if line.startswith("| SupCon |"))
    probe = results["runs"]["supcon_seed0"]["probe"]["value"]
    assert row.split("|")[3].strip() == f"{100 * probe:.1f}"
    picture = tmp_path / paper_plot.DIFFERENCES_FILE
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"(../results/{picture.name})" in text
    with_machine({**results, "seeds": [0, 1]}, tmp_path)
    assert paper_table.main([*where, "--check"]) == 1


def test_this_readme_shows_the_stored_results() -> None:
    assert paper_table.main(["--check"]) == 0
    pictures = re.findall(r"\(\.\./results/(paper_\w+\.png)\)", paper_table.PAGE.read_text(encoding="utf-8"))
    assert pictures
    for name in pictures:
        assert (paper_table.RESULTS / name).is_file()


def test_readme_needs_its_markers(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    where = ["--results", str(tmp_path), "--page", str(readme)]
    assert paper_table.main(where) == 2
    assert "no results of paper_results.py" in capsys.readouterr().err
    with_machine(results, tmp_path)
    assert paper_table.main(where) == 2
    assert "the page must contain" in capsys.readouterr().err


def test_seeds_and_sure_differences(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    row = changed["rows"][0]
    row["runs"] = ["ce_seed0", "ce_seed1"]
    other = copy.deepcopy(changed["runs"]["ce_seed0"])
    changed["runs"]["ce_seed0"]["probe"]["value"], other["probe"]["value"] = 0.5, 0.7
    changed["runs"]["ce_seed1"] = other
    row["probe_difference"] = {"value": 0.111, "low": 0.1, "high": 0.12}
    line = next(line for line in paper_table.render(changed).splitlines() if line.startswith("| cross"))
    assert "| 60.0 ± 14.1 |" in line
    assert "| **+11.1 [+10.0, +12.0]** |" in line
    row["probe_difference"]["low"] = -0.01
    assert "**" not in next(x for x in paper_table.render(changed).splitlines() if x.startswith("| cross"))


def test_goals_are_met_or_missed(results: dict[str, Any]) -> None:
    one = copy.deepcopy(results)
    one["rows"][0]["method"], one["rows"][2]["method"] = "SupCon + cNCE", paper_goals.THANOS
    one["rows"][0]["probe_difference"] = {"value": 0.05, "low": 0.01, "high": 0.09}
    one["rows"][2]["probe_difference"] = {"value": 0.12, "low": 0.10, "high": 0.14}
    order = {
        "method": paper_goals.THANOS,
        "less": "SupCon + cNCE",
        "figure": "probe",
        "value": 0.02,
        "low": -0.01,
        "high": 0.05,
    }
    one["orders"] = [order]
    strong = copy.deepcopy(one)
    strong["regime"] = "strong"
    strong["rows"][2]["probe_difference"] = {"value": -0.02, "low": -0.04, "high": -0.01}
    margin = copy.deepcopy(results)
    margin["rows"][0]["method"] = "SINCERE"
    margin["rows"][0]["margin_difference"] = {"value": 0.3, "low": 0.2, "high": 0.4}
    found = paper_goals.goals([one, strong, margin])
    assert [(goal.measured, goal.met) for goal in found] == [
        ("+12.0 points", True),
        ("+5.0 [+1.0, +9.0] points", True),
        ("+2.0 [-1.0, +5.0] points", False),
        ("-2.0 [-4.0, -1.0] points", False),
        ("+0.300 [+0.200, +0.400]", True),
    ]
    assert paper_goals.table([one]).count("MISSED") == 1
    one["rows"][2]["probe_difference"]["value"] = 0.11
    assert not paper_goals.goals([one])[0].met
    assert paper_goals.table([]) == ""


def test_seeds_that_not_every_method_has_do_not_count(runs: Path, tmp_path: Path) -> None:
    table = dataclasses.replace(TABLE, seeds=(0, 1), also_against=("ce",))
    (tmp_path / TABLE.name).mkdir()
    for run in (runs / TABLE.name).iterdir():
        (tmp_path / TABLE.name / run.name).symlink_to(run)
    (tmp_path / TABLE.name / "supcon_seed1").symlink_to(runs / TABLE.name / "supcon_seed0")
    found = paper_results.collect(table, tmp_path)
    assert found is not None
    assert found["seeds"] == [0]
    assert len(found["rows"]) == 3
    values = {row["method"]: row["probe"]["mean"] for row in found["rows"]}
    assert {order["less"] for order in found["orders"]} == {"cross-entropy"}
    for order in found["orders"]:
        assert order["value"] == pytest.approx(values[order["method"]] - values["cross-entropy"])


def test_the_sweep_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    sweep = copy.deepcopy(results)
    sweep["table"] = paper_plot.ALPHA_TABLE
    for row, alpha in zip(sweep["rows"], (0, 0.5, 1), strict=True):
        row["method"] = f"alpha {alpha}"
    assert paper_plot.transfer_rows(sweep) == []
    assert paper_plot.draw([sweep], tmp_path) == [tmp_path / paper_plot.ALPHA_FILE]
    assert (tmp_path / paper_plot.ALPHA_FILE).read_bytes().startswith(b"\x89PNG")


def test_every_job_is_a_training_that_resolves() -> None:
    everything = list(paper_runs.jobs(paper_runs.TABLES.values(), paper_runs.SEEDS))
    assert len({job.key for job in everything}) == len(everything)
    names = {job.key for job in everything}
    for job in everything:
        assert {f"{job.table.name}/{name}" for name in job.needs} <= names
        assert paper_runs.title(job.table, job.name) == job.method.title
        if job.seed or job.method.parts:
            continue
        root = ["--data.root", "somewhere"] if job.table.data.startswith("fashion") else []
        config, _ = parse_args(job.arguments(Path("run"), root))
        strong = job.table.regime == "strong" or job.table.name.startswith(("mnist5k_fine", "mnist5k_moco"))
        assert config.data.augmentation == ("strong" if strong else "none")
        assert (config.trainer.threads, config.data.image_size, config.seed) == (1, 14, 0)
        for name, value in zip(job.method.overrides[::2], job.method.overrides[1::2], strict=True):
            section, field = name.removeprefix("--").split(".")
            assert getattr(getattr(config, section), field) == yaml.safe_load(value)
    for table in paper_runs.TABLES.values():
        assert table.name in paper_table.HEADINGS
        there = {job.name for job in everything if job.table == table}
        assert f"{table.baseline}_seed0" in there
        assert table.regime == "strong" or {f"{name}_seed0" for name in table.also_against[:1]} <= there


def test_missing_fashion_mnist_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--collect", "--tables", "fashion_mnist_none", "--fashion-root", str(tmp_path / "none")]
    assert paper_results.main([*arguments, "--results", str(tmp_path), "--runs", str(tmp_path)]) == 0
    assert re.search("fashion_mnist_none: skipped, .*none does not exist", capsys.readouterr().err)
