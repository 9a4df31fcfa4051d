"""Schedules of the learning rate, trainer.max_steps and early stopping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, Interrupted
from pysupcon.trainer import OptimizerConfig, loop
from pysupcon.trainer.checkpoint import checkpoints, read_checkpoint
from pysupcon.trainer.early_stopping import EarlyStopping
from pysupcon.trainer.optim import build_optimizer, build_scheduler
from pysupcon.trainer.run import WEIGHTS_FILE, load_run


def tiny(output_dir: Path, args: str = "") -> Config:
    fixed = "--data.dataset digits --data.augmentation weak --data.batch_size 128 --model.width 8"
    fixed += " --trainer.epochs 1 --trainer.threads 1 --evaluate false --trainer.cpu true"
    return parse_args([*fixed.split(), "--output_dir", str(output_dir), *args.split()])[0]


def learning_rates(steps: int, **fields: Any) -> list[float]:
    """The learning rates of a training with 4 steps per epoch."""
    config = OptimizerConfig(learning_rate=2.0, **fields)
    config.check()
    config.resolve()
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler = build_scheduler(config, optimizer, steps=steps, steps_per_epoch=4)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


WARMUP = [0.2, 0.65, 1.1, 1.55]
"""One epoch of warm-up from 0.1 times the maximum of 2."""


@pytest.mark.parametrize(
    ("fields", "after"),
    [
        ({"schedule": "constant"}, [2.0] * 8),
        ({"schedule": "linear"}, [2.0 - 0.25 * step for step in range(8)]),
        ({"schedule": "linear", "final": 0.5}, [2.0 - 0.125 * step for step in range(8)]),
        ({"schedule": "cosine"}, [1 + math.cos(math.pi * step / 8) for step in range(8)]),
        ({"schedule": "step", "milestones": [1.5, 2.5]}, [2.0] * 2 + [0.2] * 4 + [0.02] * 2),
        ({"schedule": "step", "milestones": [2], "gamma": 0.5}, [2.0] * 4 + [1.0] * 4),
    ],
)
@pytest.mark.parametrize("warmup", [True, False])
def test_schedules(fields: dict[str, Any], after: list[float], warmup: bool) -> None:
    if warmup:
        rates = learning_rates(12, warmup_epochs=1, warmup_start=0.1, **fields)
        assert rates == pytest.approx(WARMUP + after)
    else:
        shifted = {**fields, "milestones": [epoch - 1 for epoch in fields.get("milestones", [])]}
        assert learning_rates(8, **shifted) == pytest.approx(after)


def test_the_periodic_cosine_is_that_of_torch() -> None:
    """The rate falls for three epochs of four steps, rises for three, and so on."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0.2)
    expected = []
    for _ in range(40):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    rates = learning_rates(40, cosine_epochs=3, final=0.1)
    assert rates == pytest.approx(expected)
    assert rates[12] == pytest.approx(0.2)
    assert rates[24] == pytest.approx(2.0)
    after = learning_rates(44, cosine_epochs=3, final=0.1, warmup_epochs=1, warmup_start=0.1)
    assert after == pytest.approx(WARMUP + expected)


def test_a_warm_up_that_joins_the_cosine() -> None:
    """It ends at the value that a cosine over the whole training has there."""
    rates = learning_rates(12, warmup_epochs=1, warmup_start=0.1, final=0.1, warmup_joins=True)
    cosine = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 12)) / 2) for step in range(12)]
    assert rates[4:] == pytest.approx(cosine[4:])
    assert rates[:5] == pytest.approx([0.2 + (cosine[4] - 0.2) * step / 4 for step in range(5)])
    assert max(rates) == rates[4] < 2.0


def test_the_step_schedule_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 2.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 20], gamma=0.3)
    expected = []
    for _ in range(24):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert learning_rates(24, schedule="step", milestones=[2, 5], gamma=0.3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--optimizer.schedule constant --optimizer.final 0.1", "optimizer.final must be left out for"),
        (
            "--optimizer.schedule linear --optimizer.cosine_epochs 2",
            "optimizer.cosine_epochs must be left out for optimizer.schedule=linear",
        ),
        ("--optimizer.cosine_epochs 0", "optimizer.cosine_epochs must be greater than 0"),
        (
            "--optimizer.schedule constant --optimizer.warmup_joins true",
            "optimizer.warmup_joins must be left out for",
        ),
        ("--optimizer.warmup_joins true", "optimizer.warmup_epochs must be greater than 0 for"),
        ("--optimizer.schedule step", "optimizer.milestones must hold increasing epochs greater than 0"),
        (
            "--optimizer.schedule step --optimizer.milestones [3,2]",
            "optimizer.milestones must hold increasing",
        ),
        ("--optimizer.schedule step --optimizer.milestones [0]", "optimizer.milestones must hold increasing"),
        (
            "--optimizer.schedule step --optimizer.milestones [1] --optimizer.warmup_epochs 2 "
            "--trainer.epochs 3",
            r"optimizer.milestones must start after the warm-up of 2 epochs, got \[1.0\]",
        ),
        ("--optimizer.milestones [1]", "optimizer.milestones must be left out for optimizer.schedule=cosine"),
        ("--optimizer.gamma 0.5", "optimizer.gamma must be left out for optimizer.schedule=cosine, got 0.5"),
        ("--trainer.max_steps 0", "trainer.max_steps must be at least 1, got 0"),
        ("--trainer.early_stopping 0", "trainer.early_stopping must be at least 1, got 0"),
        (
            "--trainer.early_stopping 1 --trainer.best_by null",
            "trainer.best_by must be given for trainer.early",
        ),
    ],
)
def test_invalid_fields(tmp_path: Path, args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, args)


def test_max_steps_ends_the_training_and_its_schedule(tmp_path: Path) -> None:
    config = tiny(tmp_path, "--trainer.epochs 9 --trainer.max_steps 12 --optimizer.schedule linear")
    loop.train(config)
    log = load_run(tmp_path).log()
    assert [line["step"] for line in log] == list(range(1, 13))
    assert log[-1]["epoch"] == 1.2
    expected = [1e-3 * (1 - step / 12) for step in range(12)]
    assert [line["learning_rate"] for line in log] == pytest.approx(expected)
    assert "val_loss" in log[-1]
    assert (tmp_path / WEIGHTS_FILE).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--optimizer.warmup_epochs 0.5",
            r"optimizer.warmup_epochs must be at most 0.4, the end of the train",
        ),
        (
            "--optimizer.schedule step --optimizer.milestones [0.4]",
            r"optimizer.milestones must be less than 0.4",
        ),
    ],
)
def test_the_schedule_must_fit_into_max_steps(tmp_path: Path, args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.train(tiny(tmp_path, f"--trainer.max_steps 4 {args}"))


def test_counting_validations_without_improvement() -> None:
    stopping = EarlyStopping("loss", 2)
    history = []
    for step, value in enumerate([3.0, 2.0, 2.0, 1.5, math.nan, None], start=1):
        stopping.update(value, step)
        history.append((stopping.best, stopping.best_step, stopping.finished))
    assert history == [
        (3.0, 1, False),
        (2.0, 2, False),
        (2.0, 2, False),
        *[(1.5, 4, False)] * 2,
        (1.5, 4, True),
    ]
    assert stopping.describe() == "val_loss has not improved for 2 validations; the best is 1.5 at step 4"
    resumed = EarlyStopping("loss", 2)
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.state_dict() == stopping.state_dict()
    other = EarlyStopping("worst_group", 1)
    other.load_state_dict(stopping.state_dict())
    assert other.best is None
    for value in (0.4, 0.5):
        other.update(value, 1)
        assert not other.finished
    other.update(0.4, 2)
    assert other.finished
    with pytest.raises(TypeError, match="early_stopping must hold numbers"):
        resumed.load_state_dict({**stopping.state_dict(), "best": "low"})


def test_early_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training ends after two validations without improvement, also if it is resumed in between."""
    losses = {1: 5.0, 2: 4.0, 3: 4.5, 4: 4.5, 5: 1.0}
    monkeypatch.setattr(loop.Trainer, "_validation", lambda self: {"loss": losses[self.state.done]})
    args = "--trainer.checkpoint_steps 1 --trainer.early_stopping 2 --trainer.final_weights best"

    def check(folder: Path) -> None:
        assert [line["val_loss"] for line in load_run(folder).log()] == [5.0, 4.0, 4.5, 4.5]
        best = read_checkpoint(folder / "checkpoints/step_00000002").weights
        final = load_run(folder).model.state_dict()
        assert all(torch.equal(final[name], value) for name, value in best.items())
        said = (
            "stopped early after step 4: val_loss has not improved for 2 validations; the best is 4 at step 2"
        )
        assert said in capsys.readouterr().err

    loop.train(tiny(tmp_path / "whole", args))
    check(tmp_path / "whole")

    save, folder = loop.TrainingState.save, tmp_path / "resumed"

    def interrupted(self: Any, metrics: dict[str, float]) -> Path:
        path = save(self, metrics)
        if self.done == 3:
            raise Interrupted("enough")
        return path

    monkeypatch.setattr(loop.TrainingState, "save", interrupted)
    with pytest.raises(Interrupted):
        loop.train(tiny(folder, args))
    monkeypatch.setattr(loop.TrainingState, "save", save)
    loop.train(tiny(folder, f"{args} --resume_from_checkpoint latest"))
    check(folder)
    assert len(checkpoints(folder)) == 3
    (folder / WEIGHTS_FILE).unlink()
    loop.train(tiny(folder, f"{args} --resume_from_checkpoint latest"))  # does not train on
    check(folder)
