"""Trainings of the user's own backbone and of pretrained, partly frozen backbones."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pysupcon import user_code
from pysupcon.__main__ import main
from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError
from pysupcon.models.model import ContrastiveModel
from pysupcon.trainer import loop
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import load_run, read_log

SOURCE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.out = nn.Linear(width * 64, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, images):
        return self.out(self.body(images).view(len(images), -1))


def spread(splits):
    yield "mean", splits.test.features.std()
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(user_code._state, "allowed", False)
    sys.modules.pop("own_models", None)


def config(output_dir: Path, *args: str) -> Config:
    fixed = (
        "--data.dataset coloured_digits --data.augmentation none --data.batch_size 256 --trainer.epochs 1 "
        "--trainer.threads 1 --trainer.cpu true --evaluation.evaluators knn,own_models:spread"
    )
    return parse_args([*fixed.split(), "--output_dir", str(output_dir), *args])[0]


OWN = ("--model.backbone", "own_models:Net", "--model.backbone_args", "{width: 4}")


def test_an_own_backbone_from_training_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With GradCache, averaged weights and a key encoder; the commands ask for --allow_code."""
    run = tmp_path / "run"
    options = ("--trainer.ema_decay", "0.5", "--trainer.chunk_size", "64", "--model.momentum", "0.5")
    train(config(run, *OWN, *options))
    assert "2 parameters do not affect the embedding: unused.weight" in capsys.readouterr().err
    monkeypatch.setitem(user_code._state, "allowed", False)
    assert main(["evaluate", str(run)]) == 1
    message = capsys.readouterr().err
    assert "model.backbone=own_models:Net, evaluation.evaluators[1]=own_models:spread" in message
    assert "--allow_code" in message
    assert main(["evaluate", str(run), "--evaluators", "own_models:spread", "--allow_code"]) == 0
    assert "spread" in capsys.readouterr().out
    assert main(["export", str(run), "--output", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub/README.md").read_text()
    assert "it is built by own_models:Net, a module that must be importable" in card
    assert "ModelConfig(backbone='own_models:Net', backbone_args={'width': 4})" in card
    assert main(["concatenate", str(run), str(run), "--output", str(tmp_path / "two")]) == 0
    assert load_run(tmp_path / "two").model(torch.rand(2, 3, 8, 8)).embedding.shape == (2, 32)
    assert "model.concatenated[1].model.backbone" in load_run(tmp_path / "two").config.code_references()


def test_fine_tuning_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run starts from another; frozen weights stay; a resumed run does not read the initial weights."""
    first, second, cut = tmp_path / "first", tmp_path / "second", tmp_path / "cut"
    small = ("--model.width", "4", "--model.projection", "linear", "--evaluate", "false")
    train(config(first, *small))
    options = (
        *small, "--model.pretrained", str(first), "--model.frozen_layers", "[features.0]",
        "--optimizer.backbone_scale", "0.1", "--trainer.epochs", "2",
    )  # fmt: skip
    train(config(second, *options))
    before, after = (load_file(run / "model.safetensors") for run in (first, second))
    for name in before:
        frozen = name.startswith("backbone.features.0.")
        assert torch.equal(before[name], after[name]) == frozen, name
    assert read_log(second / "log.jsonl")[0]["learning_rate"] == 1e-3

    shutil.copytree(second, cut)
    last = sorted((cut / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    (cut / "model.safetensors").unlink()
    monkeypatch.setattr(
        "pysupcon.models.backbones.load_initial_weights", lambda *_: pytest.fail("the file was read")
    )
    train(config(cut, *options, "--resume_from_checkpoint", "latest"))
    resumed = load_file(cut / "model.safetensors")
    assert all(torch.equal(resumed[name], after[name]) for name in after)


def test_a_model_without_trained_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = loop.build_model

    def frozen(*args: object) -> ContrastiveModel:
        return build(*args).requires_grad_(False)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "build_model", frozen)
    with pytest.raises(ConfigError, match="model must have a parameter that is trained, got 'small_cnn'"):
        train(config(tmp_path / "run", "--evaluate", "false"))


def test_a_wrong_evaluator_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluators=own_models:none cannot be imported"):
        train(config(tmp_path / "run", "--evaluation.evaluators", "own_models:none"))
    assert not (tmp_path / "run").exists()
