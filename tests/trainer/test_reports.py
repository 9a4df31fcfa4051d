"""What a training tells its user: a row per epoch, how it was started, and trainings that do not learn."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pysupcon.config import Config, parse_args
from pysupcon.errors import Interrupted
from pysupcon.trainer import loop, provenance, report
from pysupcon.trainer.diagnosis import EPOCHS, MEASUREMENTS, STEPS, Diagnosis
from pysupcon.trainer.provenance import git_state, record_start
from pysupcon.trainer.run import load_run


def tiny(output_dir: Path, args: str = "") -> Config:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 2 --trainer.threads 1 --evaluate false --trainer.cpu true"
    return parse_args([*fixed.split(), "--output_dir", str(output_dir), *args.split()])[0]


def rows(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "summary.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


# --- a row per epoch


def test_a_row_and_a_line_per_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for an incomplete last epoch, and the same after an interruption in the middle of an epoch."""
    args = "--trainer.max_steps 25 --trainer.metrics_steps 5"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    loop.train(tiny(whole, args))
    said = capsys.readouterr().err
    log, found = load_run(whole).log(), rows(whole)
    assert [(row["epoch"], row["step"]) for row in found] == [(1, 10), (2, 20), (3, 25)]
    for row, lines in zip(found, (log[:10], log[10:20], log[20:]), strict=True):
        assert row["loss"] == pytest.approx(sum(line["loss"] for line in lines) / len(lines))
        measured = [line["contrastive_accuracy"] for line in lines if "contrastive_accuracy" in line]
        assert row["contrastive_accuracy"] == pytest.approx(sum(measured) / len(measured))
        assert row["val_loss"] == lines[-1]["val_loss"]
        assert row["learning_rate"] == lines[-1]["learning_rate"]
        seconds = sum(1 / line["images_per_second"] for line in lines)
        assert row["images_per_second"] == pytest.approx(len(lines) / seconds)
    expected = f"epoch 3/3: loss {found[2]['loss']:.4g}, val loss {found[2]['val_loss']:.4g}, contrastive"
    assert said.count("epoch ") == 3
    assert expected in said

    save = loop.TrainingState.save

    def interrupt(self: Any, metrics: dict[str, float]) -> Path:
        path = save(self, metrics)
        if self.done == 14:
            raise Interrupted("enough")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingState, "save", interrupt)
        with pytest.raises(Interrupted):
            loop.train(tiny(resumed, f"{args} --trainer.checkpoint_steps 14"))
    (resumed / "summary.csv").write_text("nonsense")
    loop.train(tiny(resumed, f"{args} --resume_from_checkpoint latest"))
    for name in ("epoch", "step", "loss", "contrastive_accuracy", "gradient_norm", "learning_rate"):
        assert [row[name] for row in rows(resumed)] == [row[name] for row in found]
    assert [row.get("val_loss") for row in rows(resumed)] == [None, *(row["val_loss"] for row in found[1:])]
    entries = json.loads((resumed / "environment.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 14]


def test_no_bar_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "INTERVAL", -1.0)
    loop.train(tiny(tmp_path, "--trainer.max_steps 3"))
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "it/s" not in said
    assert [line.partition(":")[0] for line in said.splitlines() if "loss" in line] == [
        "step 1/3", "step 2/3", "epoch 1/1",
    ]  # fmt: skip


# --- how a training was started


def test_environment_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--loss.name", "two words"])
    for step in (0, 5):
        record_start(tmp_path, step=step, processes=2, device=torch.device("cpu"))
    first, second = json.loads((tmp_path / provenance.FILE).read_text())
    assert (first["step"], second["step"]) == (0, 5)
    assert first["command"].endswith("train.py --loss.name 'two words'")
    assert first["folder"] == str(tmp_path)
    assert first["versions"]["torch"] == torch.__version__
    assert (first["device"], first["processes"]) == ("cpu", 2)
    (tmp_path / provenance.FILE).write_text("[nonsense")
    record_start(tmp_path, step=5, processes=2, device=torch.device("cpu"))
    assert len(json.loads((tmp_path / provenance.FILE).read_text())) == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs Git")
def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "changed": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


# --- trainings that do not learn


def diagnose(lines: list[dict[str, Any]], warmup_epochs: float = 0.0) -> list[tuple[int, str]]:
    """(step, first word) of the messages for lines of a training with 10 steps per epoch."""
    diagnosis, found = Diagnosis(10, warmup_epochs), []
    for step, line in enumerate(lines, start=1):
        found += [
            (step, text.split()[0]) for text in diagnosis.add({"step": step, "epoch": step / 10, **line})
        ]
    return found


def test_a_loss_that_is_zero_by_construction() -> None:
    zero, good = {"valid_anchors": 0, "contrastive": 0.0}, {"valid_anchors": 2, "contrastive": 1.0}
    assert diagnose([zero] * 3 * STEPS) == [(STEPS, "the")]
    assert diagnose(([zero] * (STEPS - 1) + [good]) * 5) == []
    assert diagnose([{"contrastive": 0.0}] * STEPS) == [(STEPS, "the")]
    assert diagnose([{"loss": 0.0, "cross_entropy": 0.0}] * 30) == []


def test_a_plateau_at_the_chance_level() -> None:
    def line(loss: float) -> dict[str, float]:
        return {"contrastive": loss, "chance": 5.0}

    assert diagnose([line(5.02)] * 90) == [(10 * EPOCHS, "no")]
    assert diagnose([line(5.0), line(4.98)] * 45) == [(10 * EPOCHS, "no")]
    assert diagnose([line(5.02)] * 90, warmup_epochs=2) == [(20 + 10 * EPOCHS, "no")]
    falling = [line(7 - 0.02 * step) for step in range(100)]
    assert diagnose(falling) == []
    assert diagnose([line(5.02)] * 20 + [line(4.9)] * 70) == []
    assert diagnose([{"cross_entropy": 1.0, "chance": 0.0}] * 90) == []


def test_a_collapse() -> None:
    equal = {"positive_similarity": 0.9999, "negative_similarity": 0.998, "contrastive": 5.0, "chance": 5.0}
    steps = [equal if step % 2 else {"contrastive": 5.0, "chance": 5.0} for step in range(90)]
    # Measured at steps 2, 4, ...; those of the first epoch do not count. The plateau is not named as well.
    assert diagnose(steps) == [(10 + 2 * MEASUREMENTS, "collapse:")]
    assert diagnose(steps, warmup_epochs=2)[-1] == (20 + 2 * MEASUREMENTS, "collapse:")
    apart = {**equal, "negative_similarity": 0.9, "contrastive": 4.0}
    assert diagnose([apart] * 90) == []
    assert diagnose([equal, equal, apart] * 30) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", None),
        ("--loss.name spread --optimizer.warmup_epochs 1", None),
        ("--data.views 1 --data.labels fine --data.batch_size 4 --data.sampler shuffled", None),
        (
            "--data.views 1 --data.labels fine --data.batch_size 2 --data.sampler shuffled",
            "the contrastive loss is 0 by construction",
        ),
        ("--optimizer.learning_rate 1e-12 --loss.temperature 5", "no progress: for 3 epochs the contrastive"),
    ],
)
@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
def test_the_diagnosis_of_real_trainings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: str, said: str | None
) -> None:
    """Healthy ones say nothing."""
    loop.train(tiny(tmp_path, f"--trainer.best_by null --trainer.epochs 4 --trainer.max_steps 40 {args}"))
    output = capsys.readouterr().err
    words = ("no progress", "collapse", "0 by construction")
    assert [word for word in words if word in output] == [word for word in words if word in (said or "")]
    assert (said or "") in output
