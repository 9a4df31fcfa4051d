"""What the trainer says at the start about classes and partners in the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pysupcon import train as entry
from pysupcon.config import Config, config_of
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.trainer.batch_notes import batch_notes
from pysupcon.trainer.diagnosis import STEPS
from pysupcon.user_code import name_objects


def made(dataset: str, loss: dict[str, Any] | None = None, **data: Any) -> Config:
    fields = {"batch_size": 20, "views": 2, "augmentation": "weak", **data}
    config = config_of(None, {"data": {"dataset": dataset, **fields}, "loss": loss or {}})
    config.resolve()
    return config


class Many:
    """Grey images of ``counts[k]`` samples of class k."""

    def __init__(self, counts: list[int]) -> None:
        self.targets = [label for label, count in enumerate(counts) for _ in range(count)]
        self.classes = [f"name {label}" for label in range(len(counts))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), self.targets[index], dtype=torch.uint8), self.targets[index]


def notes(
    counts: list[int], processes: int = 1, loss: dict[str, Any] | None = None, **data: Any
) -> list[str]:
    splits = {"train": Many(counts), "val": Many(counts), "test": Many(counts)}
    config = made(next(iter(name_objects([splits]))), loss, **data)
    return batch_notes(config, load_data(config.data, splits), processes).lines


HUNDRED = [6] * 100


def test_the_share_and_its_remedies() -> None:
    (line,) = notes(HUNDRED, batch_size=128)
    assert line.startswith("44% of the samples have a partner, another sample of their class, in a batch (")
    assert "data.sampler balanced, 128 samples, 100 classes)" in line
    assert "the other samples have only their own views as positives" in line
    assert "data.sampler per_class with data.samples_per_class 2 (pysupcon.data.PerClassBatches" in line
    assert line.endswith("or data.batch_size of at least 182")
    (line,) = notes(HUNDRED, batch_size=64)
    assert line.startswith("0% of")
    (line,) = notes(HUNDRED, batch_size=64, sampler="shuffled")
    assert line.startswith("43% of")
    (line,) = notes(HUNDRED, batch_size=128, views=1)
    assert "the other samples have no contrastive loss" in line
    # Two processes: each contrasts its own 128 of 256 samples.
    (line,) = notes(HUNDRED, processes=2, batch_size=256)
    assert "44% of" in line
    assert "in the part of a batch of each of the 2 processes" in line
    assert line.endswith("data.batch_size of at least 364, or loss.gather true")


@pytest.mark.parametrize("loss", ["supcon", "sincere", "spread", "dcl", "cnce", "eps_supinfonce"])
def test_the_named_remedies_help(loss: str) -> None:
    assert notes(HUNDRED, loss={"name": loss}, batch_size=128)
    assert not notes(HUNDRED, loss={"name": loss}, batch_size=182)
    per_class = {"sampler": "per_class", "samples_per_class": 2, "batch_size": 128}
    assert not notes(HUNDRED, loss={"name": loss}, **per_class)


def test_nothing_to_say() -> None:
    assert not notes(HUNDRED, loss={"name": "infonce"}, batch_size=64)
    assert not notes(HUNDRED, loss={"queue": 512}, batch_size=64)
    assert not notes(HUNDRED, loss={"gather": True}, processes=2, batch_size=256)
    assert not notes([30] * 10, batch_size=64, sampler="shuffled")
    config = config_of(
        None, {"loss.name": "none", "loss.cross_entropy_weight": 1, "model.classifier": True,
               "data.dataset": "digits", "data.labels": "fine", "data.batch_size": 8},
    )  # fmt: skip
    config.resolve()
    assert not batch_notes(config, load_data(config.data), 1).lines


def test_classes_of_a_single_sample() -> None:
    line, share = notes([20, 20, 1, 20, 1, 1, 1])
    assert share.startswith("43% of the samples have a partner")
    assert line.startswith("4 classes have a single training sample (name 2, name 4, name 5, ...), which")
    line, _ = notes([20, 20, 1])
    assert line.startswith("1 class has a single training sample (name 2), which")


@pytest.mark.parametrize(
    "sampler", [{"sampler": "balanced"}, {"sampler": "per_class", "samples_per_class": 2}]
)
def test_copies_of_a_single_sample_are_no_partners(sampler: dict[str, Any]) -> None:
    single, line = notes([1, 1, 1, 10], batch_size=8, **sampler)
    assert single.startswith("3 classes have a single training sample")
    assert line.startswith("25% of the samples have a partner, another sample of their class, in a batch (")
    assert "the other samples have at most copies and views of themselves as positives" in line
    assert line.endswith("To change this: more samples of each class")  # per_class would not help
    _, line = notes([1, 1, 1, 10], batch_size=8, views=1, **sampler)
    assert "the other samples have at most copies of themselves as positives" in line


def test_copies_are_not_a_loss_of_zero() -> None:
    assert (
        "at most copies of themselves"
        in notes([1] * 10, batch_size=8, views=1, sampler="per_class", samples_per_class=2)[1]
    )


def test_one_class() -> None:
    message = (
        r"data.labels=coarse: the 40 training samples must have two or more classes for loss.name=supcon, "
        r"which contrasts classes, got one class, 'name 0': use a data.root .*infonce"
    )
    with pytest.raises(ConfigError, match=message):
        notes([40])
    assert not notes([40], loss={"name": "spread"})
    assert not notes([40], loss={"name": "infonce"})
    config = made("digits", labels="fine")
    data = load_data(config.data)
    data.training.fine.zero_()
    with pytest.raises(ConfigError, match=r"got one class, '0': use data.labels coarse \(2 classes\), a"):
        batch_notes(config, data, 1)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
def test_a_training_says_a_loss_of_zero_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = entry.run(
        data={"dataset": "digits", "labels": "fine", "batch_size": 8, "views": 1, "augmentation": "none"},
        model={"width": 2}, evaluate=False, output_dir=str(tmp_path / "run"),
        trainer={"max_steps": STEPS + 2, "cpu": True, "best_by": None, "threads": 1},
    )  # fmt: skip
    assert [line["contrastive"] for line in run.run.log()] == [0] * (STEPS + 2)
    said = capsys.readouterr().err
    assert said.count("so the contrastive loss is 0") == 1
    assert "0 by construction" not in said


def test_a_refused_training_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two or more classes"):
        entry.run(
            dataset={name: Many([30]) for name in ("train", "val", "test")}, data={"batch_size": 10},
            output_dir=str(tmp_path / "run"), trainer={"cpu": True},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
