"""The evaluation of a run, from its folder to the report, and all errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from pysupcon.__main__ import COMMANDS, main
from pysupcon.config import Config, load_config, to_yaml
from pysupcon.errors import RunError
from pysupcon.evaluation import evaluate
from pysupcon.evaluation.evaluate import evaluate_run
from pysupcon.evaluation.features import extract_features
from pysupcon.evaluation.pictures import loss_curves
from pysupcon.evaluators import EvaluationConfig, GeometryConfig, KNNConfig, ProjectionConfig
from pysupcon.reports.report import Report
from pysupcon.trainer.run import build_model, load_data, load_run

FILES = {"metrics.json", "report.md", "report.html", "embedding.png", "loss.png", "outcomes.safetensors"}
CONFUSIONS = {"confusion_fine.png", "confusion_coarse.png"}
QUICK = EvaluationConfig(
    evaluators=["knn", "geometry"],
    knn=KNNConfig(k=[1, 5]),
    projection=ProjectionConfig(method="pca"),
    progress=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few seconds: cross-entropy on the coarse labels of 8x8 digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    config = Config()
    config.data.dataset = "digits"
    config.data.batch_size = 64
    config.model.projection = "linear"
    config.evaluation.knn.k = [3]
    config.resolve()
    (folder / "config.yaml").write_text(to_yaml(config))
    data = load_data(load_config(folder / "config.yaml").data)
    torch.manual_seed(0)
    model = build_model(config, data)
    train = data.evaluation_dataset("train")
    images = torch.stack([train[i][0] for i in range(0, len(train), 3)])
    head = torch.nn.Linear(model.embedding_dim, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 2e-3)
    lines = []
    for step in range(12):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(head(model(images[rows]).embedding), train.coarse[::3][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lines.append(
            {"step": step + 1, "loss": loss.item(), "contrastive": loss.item(), "chance": math.log(2)}
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "digits", ignore=shutil.ignore_patterns("evaluation")))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Images(Dataset):
    """Image i is filled with i; coarse i % 2, fine i % 5."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return torch.full((1, 2, 2), float(index)), index % 2, index % 5


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (11, 0), (100, 0), (3, 2)])
def test_features_keep_the_order_of_the_data(batch_size, workers):
    found = extract_features(
        lambda images: images.flatten(1)[:, :3].half(),
        Images(11),
        batch_size=batch_size,
        device=torch.device("cpu"),
        workers=workers,
    )
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features, torch.arange(11.0)[:, None].expand(11, 3))
    assert torch.equal(found.coarse, torch.arange(11) % 2)
    assert torch.equal(found.fine, torch.arange(11) % 5)
    assert not found.features.requires_grad
    assert not found.features.is_inference()


def test_the_whole_evaluation(run_dir, capsys):
    """With the defaults of every evaluator except k, which the run's config sets."""
    assert main(["evaluate", str(run_dir), "--progress", "false"]) == 0
    printed = capsys.readouterr()
    folder = run_dir / "evaluation"
    pictures = {f"{kind}_{level}.png" for kind in ("separation", "curves") for level in ("fine", "coarse")}
    assert set(contents(folder)) == FILES | CONFUSIONS | pictures
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]

    report = Report.from_json((folder / "metrics.json").read_text())
    values = {name: metric.value for name, metric in report.metrics.items()}
    assert {name.partition("/")[0] for name in values} == set(EvaluationConfig().evaluators)
    assert {name for name in values if name.startswith("knn/")} == {
        "knn/k=3/fine/accuracy",
        "knn/k=3/coarse/accuracy",
    }
    assert values["coarse_to_fine/coarse/accuracy"] > 0.85
    assert values["coarse_to_fine/fine/accuracy"] > 0.7
    assert all(
        metric.low is not None for name, metric in report.metrics.items() if name.endswith("accuracy")
        if not name.endswith("val_accuracy")
    )  # fmt: skip
    assert report.metadata["samples"] == {"train": 1295, "val": 143, "test": 359}
    assert report.metadata["seconds"]["total"] > 0
    assert "linear_probe" not in report.metadata["arguments"]
    assert report.metadata["arguments"]["knn"]["k"] == [3]
    assert printed.out.splitlines()[:-2] == report.summary().splitlines()
    assert len(printed.out.splitlines()) <= 15
    assert report.headline[0] in printed.out
    assert f"{folder / 'report.html'}" in printed.out
    assert "fine/accuracy" in (folder / "report.md").read_text()

    outcomes = load_file(folder / "outcomes.safetensors")
    for name, correct in outcomes.items():
        assert correct.shape == (359,), name
        if name.endswith("/correct"):
            accuracy = values[f"{name.removesuffix('/correct')}/accuracy"]
            assert correct.double().mean().item() == accuracy
    test = load_run(run_dir).splits()["test"]
    assert torch.equal(outcomes["labels/fine"], test.fine)
    assert torch.equal(outcomes["labels/coarse"], test.coarse)


def test_the_command_line_overrides_the_run(run_dir, capsys):
    arguments = ["--evaluators", "[knn]", "--knn.temperature", "0.5", "--projection.method", "pca"]
    assert main(["evaluate", str(run_dir), *arguments, "--bootstrap.confidence", "0.8"]) == 0
    report = Report.from_json((run_dir / "evaluation" / "metrics.json").read_text())
    assert set(report.metrics) == {"knn/k=3/fine/accuracy", "knn/k=3/coarse/accuracy"}
    assert report.metadata["arguments"]["knn"] | {"chunk_bytes": 0} == {
        "k": [3],
        "temperature": 0.5,
        "votes": "exp",
        "chunk_bytes": 0,
    }
    assert "80 % interval" in capsys.readouterr().out


def test_evaluating_twice_gives_the_same_numbers_and_deletes_stale_files(run_dir):
    first = evaluate_run(run_dir, QUICK)
    outcomes = (run_dir / "evaluation" / "outcomes.safetensors").read_bytes()
    (run_dir / "log.jsonl").unlink()
    (run_dir / "evaluation" / "note.txt").write_text("mine")
    second = evaluate_run(str(run_dir), QUICK)
    assert second.metrics == first.metrics
    assert (run_dir / "evaluation" / "outcomes.safetensors").read_bytes() == outcomes
    # Without a log there is a message and no curve. The old curve is deleted; files of the user stay.
    assert second.warnings == [f"no loss curve: {run_dir / 'log.jsonl'} is missing"]
    assert set(contents(run_dir / "evaluation")) == (FILES | CONFUSIONS | {"note.txt"}) - {"loss.png"}


def test_features_are_those_before_the_head_without_augmentation(run_dir):
    run = load_run(run_dir)
    test = run.splits()["test"]
    images = torch.stack([test[i][0] for i in range(len(test))])
    with torch.no_grad():
        rows = F.normalize(run.model(images).embedding.double(), dim=1)
    spread = (rows - rows.mean(dim=0)).square().sum(dim=1).mean().item()
    report = evaluate_run(run, QUICK)
    assert report.metrics["geometry/variance/total"].value == pytest.approx(spread, rel=1e-4)


def test_collapse_is_reported(run_dir):
    weights = load_file(run_dir / "model.safetensors")
    save_file({name: 1e-6 * value if value.is_floating_point() else value for name, value in weights.items()},
              run_dir / "model.safetensors")  # fmt: skip
    geometry = GeometryConfig(complete_collapse_below=1.0)
    config = EvaluationConfig(["geometry"], geometry=geometry, projection=QUICK.projection, progress=False)
    report = evaluate_run(run_dir, config)
    assert [warning.partition(":")[0] for warning in report.warnings] == ["complete collapse"]
    assert "complete collapse" in (run_dir / "evaluation" / "report.md").read_text()
    assert "warning: complete collapse" in report.summary()


# Invalid input. Every failure must keep the earlier evaluation.


def break_nothing_there(run_dir: Path) -> str:
    shutil.rmtree(run_dir)
    return f"{run_dir} must be the folder of a run, but there is no such folder"


def break_no_run(run_dir: Path) -> str:
    (run_dir / "config.yaml").unlink()
    return f"{run_dir} holds no run"


def break_config(run_dir: Path) -> str:
    (run_dir / "config.yaml").write_text("data: [unclosed")
    return f"{run_dir / 'config.yaml'} cannot be read as YAML"


def break_missing_weights(run_dir: Path) -> str:
    (run_dir / "model.safetensors").unlink()
    return f"{run_dir / 'model.safetensors'} is missing"


def break_truncated_weights(run_dir: Path) -> str:
    path = run_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path} is truncated"


def break_empty_weights(run_dir: Path) -> str:
    path = run_dir / "model.safetensors"
    path.write_bytes(b"")
    return f"{path} is truncated"


def break_nan_weights(run_dir: Path) -> str:
    weights = load_file(run_dir / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 4)
    weights[name].fill_(math.nan)
    save_file(weights, run_dir / "model.safetensors")
    return f"the train split of {run_dir}: features must be finite, got NaN or infinity in 1295 of 1295 rows"


@pytest.mark.parametrize(
    "breakage",
    [
        break_nothing_there,
        break_no_run,
        break_config,
        break_missing_weights,
        break_truncated_weights,
        break_empty_weights,
        break_nan_weights,
    ],
)
def test_broken_runs_are_named_and_earlier_results_stay(run_dir, breakage, capsys):
    evaluated = run_dir / "evaluation"
    evaluated.mkdir()
    (evaluated / "metrics.json").write_text("earlier")
    message = breakage(run_dir)
    assert main(["evaluate", str(run_dir)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    if run_dir.exists():
        assert contents(evaluated) == {"metrics.json": b"earlier"}
        assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]


def test_a_failure_at_the_end_keeps_the_earlier_evaluation(run_dir, monkeypatch):
    evaluate_run(run_dir, QUICK)
    before = contents(run_dir / "evaluation")

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluate, "write_results", full_disk)
    with pytest.raises(RunError, match=f"^{run_dir}/evaluation could not be written: no space left"):
        evaluate_run(run_dir, QUICK)
    assert contents(run_dir / "evaluation") == before
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]


def test_small_splits_are_refused(run_dir):
    class Small:
        def __init__(self, run) -> None:
            self.dir, self.model, self.config, self.data = run.dir, run.model, run.config, run.data
            self.full = run.splits()

        def splits(self):
            return self.full | {"test": Subset(self.full["test"], [0])}

    with pytest.raises(RunError, match=r"the test split of .* must hold at least 2 samples, got 1"):
        evaluate_run(Small(load_run(run_dir)), QUICK)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--knn.k", "[0]"], 1, "knn.k must be one or more positive numbers of neighbours, got [0]"),
        (["--evaluators", "[nobody]"], 1, "evaluators must be among"),
        (["--device", "nowhere"], 1, "device must be auto or a device of this machine, got 'nowhere'"),
        (["--knn.temperature", "warm"], 2, "knn.temperature"),
        (["--geometry.split", "dev"], 2, "geometry.split"),
        (["--nothing", "1"], 2, "--nothing"),
    ],
)
def test_bad_arguments_name_the_field(run_dir, capsys, arguments, status, message):
    try:
        found = main(["evaluate", str(run_dir), *arguments])
    except SystemExit as error:  # argparse's own way out
        found = error.code
    assert found == status
    assert message in capsys.readouterr().err
    assert not (run_dir / "evaluation").exists()


@pytest.mark.parametrize(
    ("argv0", "program"),
    [
        ("/some/bin/pysupcon", "pysupcon"),
        ("C:\\Scripts\\pysupcon.exe", "pysupcon"),
        ("/some/pysupcon/__main__.py", "python -m pysupcon"),
    ],
)
def test_the_usage_names_the_program_as_it_was_started(capsys, monkeypatch, argv0, program):
    monkeypatch.setattr("sys.argv", [argv0.replace("\\", "/"), "--help"])
    assert main() == 0
    assert f"usage: {program} COMMAND" in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: {program} {command}" in capsys.readouterr().out


def test_the_dispatcher_explains_itself(capsys):
    assert main(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out
    assert main([]) == 2
    assert "COMMAND must be one of train, " in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "got 'fit'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "--knn.temperature" in capsys.readouterr().out


def test_loss_curves():
    log = [
        {"step": 1, "loss": 3.0, "contrastive": 2.0, "cross_entropy": 1.0, "chance": 5.0},
        {"note": "no step"},
        {"step": 2, "loss": 2.5, "contrastive": 2.0, "cross_entropy": 0.5, "chance": 5.5, "val_loss": 2.25},
        {"step": 3, "loss": 2.0, "contrastive": 1.5, "cross_entropy": 0.5, "chance": 5.5, "val_loss": 2.0},
    ]
    steps, losses, chance, validation = loss_curves(log)
    assert steps == [1, 2, 3]
    assert losses == {
        "loss": [3.0, 2.5, 2.0],
        "contrastive": [2.0, 2.0, 1.5],
        "cross_entropy": [1.0, 0.5, 0.5],
    }
    assert chance == {"contrastive": [5.0, 5.5, 5.5]}
    assert list(validation) == ["loss"]
    assert math.isnan(validation["loss"][0])
    assert validation["loss"][1:] == [2.25, 2.0]
    assert loss_curves([{"step": 4, "loss": 1.0, "contrastive": 1.0}]) == (
        [4],
        {"contrastive": [1.0]},
        {},
        {},
    )
    only = {"step": 4, "loss": 0.5, "reconstruction": 1.0}
    assert loss_curves([only]) == ([4], {"reconstruction": [1.0]}, {}, {})
    with pytest.raises(RunError, match="no line with a step and a loss"):
        loss_curves([{"step": 1}])
