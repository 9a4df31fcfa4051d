"""Paired comparison of runs: metrics known by construction, seeds of one config, and all errors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pysupcon.__main__ import main
from pysupcon.commands.compare import compare, to_markdown
from pysupcon.errors import RunError
from pysupcon.evaluators import BootstrapConfig
from pysupcon.reports.charts import (
    draw_confusion,
    draw_curves,
    draw_differences,
    draw_groups,
    draw_outcomes,
    draw_separation,
)
from pysupcon.reports.evaluated_runs import config_key, configurations, read_run

N = 400
FIGURES = ("knn/k=1/fine/accuracy", "separation/fine/margin", "separation/fine/class=1/roc_auc")


def write_run(
    folder: Path, *, errors: int, seed: int = 0, shift: float = 0.0, loss: str = "supcon", **data
) -> Path:
    """A run in which the first ``errors`` test samples are wrong, and the target cosines lie ``shift``
    higher."""
    (folder / "evaluation").mkdir(parents=True)
    config = {
        "seed": seed,
        "output_dir": str(folder),
        "loss": {"name": loss},
        "data": {"dataset": "digits", "split_seed": 0, "test_fraction": 0.2} | data,
        "evaluation": {"batch_size": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    grid = torch.linspace(0, 0.5, N)
    labels = torch.arange(N) % 4
    outcomes = {
        "labels/fine": labels,
        "labels/coarse": labels // 2,
        "knn/k=1/fine/correct": torch.arange(N) >= errors,
        "separation/fine/target": 0.4 + shift + grid,
        "separation/fine/noise": grid.flip(0),
        "separation/fine/class": labels.clone(),
    }
    save_file(outcomes, folder / "evaluation" / "outcomes.safetensors")
    metrics = {name: {"value": 0.0, "unit": ""} for name in (*FIGURES, "geometry/spread/fine")}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({"schema": 1, "metrics": metrics}))
    return folder


def test_differences_are_paired_and_seeds_averaged(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, errors=errors, seed=seed, shift=shift, loss=loss))
        for name, errors, seed, shift, loss in (
            ("supcon_seed0", 40, 0, 0.0, "supcon"),
            ("supcon_seed1", 60, 1, 0.0, "supcon"),
            ("sincere-0", 30, 0, 0.25, "sincere"),
            ("sincere-1", 30, 1, 0.25, "sincere"),
        )
    ]
    found = compare(runs)
    assert [(c.name, len(c.runs)) for c in found.configurations] == [("supcon", 2), ("sincere", 2)]
    assert found.baseline == "supcon"
    assert list(found.values) == list(FIGURES[:2])  # no figure of single classes, none without outcomes
    supcon = found.values["knn/k=1/fine/accuracy"]["supcon"]
    assert supcon.seeds == pytest.approx([0.9, 0.85])
    assert (supcon.mean, supcon.spread) == pytest.approx((0.875, np.std([0.9, 0.85], ddof=1)))
    difference = found.differences["knn/k=1/fine/accuracy"]["sincere"]
    assert difference.value == pytest.approx(0.05)
    assert not difference.significant  # by seed: 1 and 3 of 40, of which two seeds say little
    # With one seed: the difference of a sample is 1 for 10 of 400. Its standard error, exactly:
    one = compare(runs[::2]).differences["knn/k=1/fine/accuracy"]["sincere-0"]
    error = math.sqrt(10 / N * (1 - 10 / N) / N)
    assert one.value == pytest.approx(0.025)
    assert one.low == pytest.approx(0.025 - 1.96 * error, abs=0.45 * error)
    assert one.high == pytest.approx(0.025 + 1.96 * error, abs=0.45 * error)
    assert one.significant
    # The cosines are equal except for a shift: the paired difference of margins is exactly the shift.
    margin = found.differences["separation/fine/margin"]["sincere"]
    assert (margin.value, margin.low, margin.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)
    assert compare(runs, runs[2]).differences["separation/fine/margin"]["supcon"].value == pytest.approx(
        -0.25
    )


def test_differences_of_equal_runs_are_zero(tmp_path):
    runs = [read_run(write_run(tmp_path / loss, errors=50, loss=loss)) for loss in ("a", "b")]
    difference = compare(runs).differences["knn/k=1/fine/accuracy"]["b"]
    assert (difference.value, difference.low, difference.high, difference.significant) == (0, 0, 0, False)


def test_figures_are_chosen_by_pattern_and_the_bootstrap_by_arguments(tmp_path):
    runs = [read_run(write_run(tmp_path / str(e), errors=e, loss=str(e))) for e in (20, 60)]
    assert list(compare(runs, figures=["class=1", "^knn"]).values) == [FIGURES[0], FIGURES[2]]
    wide, narrow = (
        compare(runs, bootstrap=BootstrapConfig(confidence=c)).differences[FIGURES[0]]["60"]
        for c in (0.99, 0.5)
    )
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(
        RunError, match=r"no metrics in common that match \['nothing'\].*Shared by all: knn/k=1"
    ):
        compare(runs, figures=["nothing"])


def test_configurations_are_told_apart_by_all_but_seed_and_evaluation(tmp_path):
    assert config_key({"seed": 1, "a": 2, "evaluation": {"k": 1}}) == config_key({"a": 2, "seed": 3})
    assert config_key({"seed": 1, "a": 2}) != config_key({"seed": 1, "a": 3})
    runs = [
        read_run(write_run(tmp_path / parent / "run", errors=1, loss=loss))
        for parent, loss in (("x", "a"), ("y", "b"), ("z", "c"))
    ]
    assert [c.name for c in configurations(runs)] == ["run", "run (2)", "run (3)"]


def test_the_command_writes_table_json_and_pictures(tmp_path, capsys):
    a = write_run(tmp_path / "supcon_0", errors=60)
    b = write_run(tmp_path / "supcon_1", errors=61, seed=1)
    c = write_run(tmp_path / "sincere", errors=30, shift=0.1, loss="sincere")
    output = tmp_path / "out" / "deep"
    arguments = [
        "compare",
        str(c),
        "--baseline",
        str(a),
        str(b),
        "--output",
        str(output),
        "--resamples",
        "200",
    ]
    assert main(arguments) == 0
    assert {path.name for path in output.iterdir()} == {
        "compare.md",
        "compare.json",
        "differences_percentage_points.png",
        "differences_cosine.png",
    }
    text = (output / "compare.md").read_text()
    assert "| supcon (baseline) | 2 | 84.88 ± 0.18 |" in text
    assert "| knn/k=1/fine/accuracy (%) | 84.88 ± 0.18 | **+7.63 [" in text
    assert "Resampled: test samples, and the seeds of supcon. Paired by test sample." in text
    assert "\nWarning, one seed: the interval says nothing about other seeds: sincere\n" in text
    assert "| supcon | supcon_1, supcon_0 |" in text
    content = json.loads((output / "compare.json").read_text())
    assert content["differences"][FIGURES[0]]["sincere"]["value"] == pytest.approx(30.5 / N)
    assert content["resampled"] == {"supcon": "seeds and test samples", "sincere": "test samples"}
    assert content["paired_by_seed"] == {"sincere": False}
    assert content["units"]["separation/fine/margin"] == "cosine"
    assert "supcon (baseline)" in capsys.readouterr().out


def test_seeds_of_one_config_alone_are_averaged(tmp_path):
    runs = [read_run(write_run(tmp_path / f"s{s}", errors=40 + s, seed=s)) for s in range(3)]
    found = compare(runs)
    assert found.differences[FIGURES[0]] == {}
    assert "only one configuration" in to_markdown(found)


def test_transfers_are_compared_for_any_training_data_of_the_encoders(tmp_path, capsys):
    runs = []
    for name, errors, dataset in (("a", 40, "digits"), ("b", 20, "mnist5k")):
        run = write_run(tmp_path / name, errors=errors, dataset=dataset)
        folder = run / "transfer" / "other"
        folder.mkdir(parents=True)
        labels = torch.arange(N) % 3
        outcomes = {
            "transfer/correct": torch.arange(N) >= errors,
            "labels/fine": labels,
            "labels/coarse": labels + 0,
        }
        save_file(outcomes, folder / "outcomes.safetensors")
        (folder / "metrics.json").write_text(json.dumps({"metrics": {"transfer/accuracy": {"value": 0.0}}}))
        runs.append(str(run))
    output = ["--output", str(tmp_path / "out")]
    assert main(["compare", *runs, "--of", "transfer/other", *output]) == 0
    assert "transfer/accuracy (%) | 90.00 | **+5.00 [" in capsys.readouterr().out
    assert main(["compare", *runs, *output]) == 1
    assert "data.dataset is 'digits' in" in capsys.readouterr().err
    assert main(["compare", *runs, "--of", "transfer/cars", *output]) == 1
    assert f"run `python -m pysupcon transfer {runs[0]} --data.dataset cars` first" in capsys.readouterr().err


def other_length(folder: Path) -> str:
    path = folder / "evaluation" / "outcomes.safetensors"
    save_file({"labels/fine": torch.zeros(7).long(), "labels/coarse": torch.zeros(7).long()}, path)
    return "must be tested on the same samples, but"


def other_labels(folder: Path) -> str:
    path = folder / "evaluation" / "outcomes.safetensors"
    labels = torch.arange(N) % 4
    labels[3] = 0
    save_file({"labels/fine": labels, "labels/coarse": torch.arange(N) % 4 // 2}, path)
    return "differ in 1 of 400 samples"


def other_split(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["split_seed"] = 5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return "data.split_seed is 0 in"


def not_evaluated(folder: Path) -> str:
    (folder / "evaluation" / "outcomes.safetensors").unlink()
    command = f"python -m pysupcon evaluate {folder} --features embedding"
    return f"outcomes.safetensors is missing: run `{command}` first"


def truncated(folder: Path) -> str:
    path = folder / "evaluation" / "outcomes.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    return f"{path} is truncated or not a safetensors file"


def broken_metrics(folder: Path) -> str:
    (folder / "evaluation" / "metrics.json").write_text("{")
    return "metrics.json is not a report"


def broken_config(folder: Path) -> str:
    (folder / "config.yaml").write_text("a: [")
    return f"{folder / 'config.yaml'} cannot be read"


def no_labels(folder: Path) -> str:
    save_file({"a": torch.zeros(1)}, folder / "evaluation" / "outcomes.safetensors")
    return f"holds no labels/fine: evaluate {folder} again"


def change_outcomes(folder: Path, **changed: torch.Tensor) -> None:
    path = folder / "evaluation" / "outcomes.safetensors"
    save_file(load_file(path) | {"separation/fine/target": changed["target"]}, path)


def odd_shape(folder: Path) -> str:
    change_outcomes(folder, target=torch.zeros(N, 2))
    return "separation/fine/target is of shape [400, 2] and labels/fine of shape [400]"


def scalar(folder: Path) -> str:
    change_outcomes(folder, target=torch.tensor(1.0))
    return "separation/fine/target is of shape [] and labels/fine of shape [400]"


def infinite(folder: Path) -> str:
    change_outcomes(folder, target=torch.full((N,), torch.inf))
    return f"separation/fine/margin must be finite, but the outcomes of {folder} give nan"


def deep_metrics(folder: Path) -> str:
    (folder / "evaluation" / "metrics.json").write_text('{"metrics": {"a": ' + "[" * 100_000)
    return "metrics.json is not a report: its values are nested too deeply"


def listed_metrics(folder: Path) -> str:
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": [*FIGURES, 3, None]}))
    return "metrics.json is not a report"


def config_of_a_list(folder: Path) -> str:
    (folder / "config.yaml").write_text("data: [1]")
    return "config.yaml must hold the config of a run, a mapping of sections"


def config_with_a_date(folder: Path) -> str:
    with (folder / "config.yaml").open("a") as file:
        file.write("2001-01-01: 1")
    return "config.yaml must hold the config of a run: keys must be str"


def config_of_aliases(folder: Path) -> str:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (folder / "config.yaml").write_text("\n".join(["a0: &a0 1", *levels]))
    return "config.yaml cannot be read: it must hold at most 200000 values, aliases expanded, got more"


def config_that_is_a_pipe(folder: Path) -> str:
    (folder / "config.yaml").unlink()
    os.mkfifo(folder / "config.yaml")
    return "config.yaml cannot be read: it is not a regular file"


@pytest.mark.parametrize(
    "breakage",
    [
        other_length,
        other_labels,
        other_split,
        not_evaluated,
        truncated,
        broken_metrics,
        broken_config,
        no_labels,
        odd_shape,
        scalar,
        infinite,
        deep_metrics,
        listed_metrics,
        config_of_a_list,
        config_with_a_date,
        config_of_aliases,
        config_that_is_a_pipe,
    ],
)
def test_runs_that_cannot_be_compared_raise_an_error(tmp_path, capsys, breakage):
    runs = [write_run(tmp_path / name, errors=9, loss=name) for name in ("a", "b")]
    message = breakage(runs[1])
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("pysupcon compare: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_stored_values_of_metrics_are_not_read(tmp_path, capsys):
    """compare computes the metrics from the outcomes; metrics.json only names them."""
    runs = [write_run(tmp_path / name, errors=9, loss=name) for name in ("a", "b")]
    metrics = {FIGURES[0]: {"value": float("nan")}, FIGURES[1]: {"value": {"nested": []}}, "": "x", "a/b": 3}
    (runs[1] / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "out"), "--resamples", "9"]) == 0
    assert "| knn/k=1/fine/accuracy (%) | 97.75 | 0.00 [0.00, 0.00] |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare needs two or more runs"),
        (["nowhere"], "nowhere must be the folder of a run, but there is no such folder"),
        (["--figures", "("], "missing ), unterminated subpattern"),
        (["--confidence", "2"], "bootstrap.confidence must be in (0, 1), got 2.0"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    run = write_run(tmp_path / "a", errors=1)
    assert main(["compare", str(run), *arguments]) == 1
    assert message in capsys.readouterr().err


# Pictures


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def outcome_arrays(n: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    fine = np.arange(n) % 4
    target = rng.uniform(0.5, 1, n)
    target[3] = np.nan
    return {
        "labels/fine": fine,
        "labels/coarse": fine // 2,
        "separation/fine/target": target,
        "separation/fine/noise": rng.uniform(0, 0.7, n),
        "knn/k=10/fine/predicted": fine,
        "knn/k=5/fine/predicted": np.roll(fine, 1),
        "worst_group/erm/correct": fine > 0,
        "worst_group/erm/group": fine,
    }


def test_outcomes_are_drawn_as_far_as_there_are_any(tmp_path):
    names = {"fine": {0: "zero"}, "coarse": {}}
    pictures = draw_outcomes(tmp_path, outcome_arrays(), names)
    files = [picture.file for picture in pictures]
    assert files == ["separation_fine.png", "curves_fine.png", "confusion_fine.png", "groups.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert "k=5" in pictures[2].caption  # of the neighbours, the fewest
    assert draw_outcomes(tmp_path, {"labels/fine": np.zeros(3), "labels/coarse": np.zeros(3)}, names) == []
    probed = outcome_arrays() | {"coarse_to_fine/fine/predicted": np.zeros(60, dtype=int)}
    assert "coarse_to_fine" in draw_outcomes(tmp_path, probed, names)[2].caption


def test_confusion_colours_the_cells_that_are_hit(tmp_path):
    truth = np.repeat([0, 1, 2], 20)
    for name, predicted in (("right", truth), ("wrong", (truth + 1) % 3)):
        draw_confusion(tmp_path / f"{name}.png", truth, predicted, title="")
    right, wrong = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("right", "wrong"))
    assert right.shape == wrong.shape
    dark = [(image.sum(axis=2) < 330) & (image[..., 2] > image[..., 0] + 40) for image in (right, wrong)]
    assert dark[0].sum() > 5000
    assert abs(dark[0].sum() - dark[1].sum()) < 0.1 * dark[0].sum()
    assert (dark[0] & dark[1]).sum() < 0.2 * dark[0].sum()  # other cells
    draw_confusion(tmp_path / "many.png", np.arange(100), np.arange(100), title="", names={3: "a long name"})
    assert pixels(tmp_path / "many.png").shape[0] > 500


def test_every_picture_changes_with_its_numbers(tmp_path):
    a = outcome_arrays()
    target, noise, fine = a["separation/fine/target"], a["separation/fine/noise"], a["labels/fine"]
    for name, shown in (("one", target), ("two", target - 0.3)):
        draw_separation(tmp_path / f"s{name}.png", shown, noise, title="t")
        draw_curves(tmp_path / f"c{name}.png", shown, noise, fine, title="t")
        draw_groups(tmp_path / f"g{name}.png", {"erm": shown > 0.6}, fine, title="t")
        rows = [("f", "x", float(np.nanmean(shown)) - 0.5, -0.1, 0.3), ("f", "y", 0.1, 0.05, 0.2)]
        draw_differences(tmp_path / f"d{name}.png", rows, title="t", unit="points")
    for kind in "scgd":
        first, second = (pixels(tmp_path / f"{kind}{name}.png") for name in ("one", "two"))
        assert first.shape == second.shape
        assert (first != second).any(axis=2).mean() > 1e-3, kind
    draw_curves(
        tmp_path / "many.png", np.linspace(0, 1, 50), np.linspace(0, 0.9, 50), np.arange(50), title="t"
    )
