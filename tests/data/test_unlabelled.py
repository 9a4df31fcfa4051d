"""Samples whose class is not known: data.ignore_index takes them out of splits, class counts and samplers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.data_files import write_grey_image

from pysupcon.config import parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.samples import Samples
from pysupcon.data.sources import read_source
from pysupcon.data.unlabelled import UNKNOWN, take_out
from pysupcon.errors import ConfigError

DIGITS = DataConfig("digits", labels="fine", sampler="shuffled", batch_size=100, test_fraction=0.2)


def test_the_class_is_taken_out() -> None:
    """The digit 3 is unknown: the others are numbered 0 to 8, and 4 to 9 move down by one."""
    whole, data = DataModule(DIGITS), DataModule(replace(DIGITS, ignore_index=3))
    assert data.fine_names == [str(digit) for digit in range(10) if digit != 3] == data.class_names
    assert data.coarse_names == whole.coarse_names
    source = read_source(DIGITS).train
    assert data.unlabelled is not None
    assert torch.equal(data.unlabelled.images, source.images[source.fine == 3])
    assert data.unlabelled.fine.unique().tolist() == [UNKNOWN]
    assert data.unlabelled.coarse.unique().tolist() == [UNKNOWN]
    digit_of = {
        image.numpy().tobytes(): int(digit) for image, digit in zip(source.images, source.fine, strict=True)
    }
    for samples in data.splits.values():
        digits = torch.tensor([digit_of[image.numpy().tobytes()] for image in samples.images])
        assert set(digits.tolist()) == set(range(10)) - {3}
        assert torch.equal(samples.fine, digits - (digits > 3).long())
        assert torch.equal(samples.coarse, (digits >= 5).long())  # "low" is 0, "high" is 1
    sizes = sum(len(samples) for samples in data.splits.values())
    assert sizes + len(data.unlabelled) == len(source)
    assert len(data.training) == len(data.splits["train"]) + len(data.unlabelled)


def test_a_coarse_class_takes_its_fine_classes_out() -> None:
    data = DataModule(replace(DIGITS, labels="coarse", ignore_index=0))
    assert data.fine_names == ["5", "6", "7", "8", "9"]
    assert len(data.coarse_names) == 1
    assert data.splits["train"].fine.unique().tolist() == [0, 1, 2, 3, 4]
    assert data.splits["train"].coarse.unique().tolist() == [0]


@pytest.mark.parametrize("sampler", ["shuffled", "balanced"])
def test_batches(sampler: str) -> None:
    """Shuffled batches hold every sample once in an epoch; balanced ones hold those of known classes."""
    data = load_data(replace(DIGITS, ignore_index=3, sampler=sampler, batch_size=90))  # type: ignore[arg-type]
    batches = data.batch_sampler(seed=0, steps=100)
    assert batches.steps_per_epoch == len(data.training) // 90
    views, labels = next(iter(data.loader(batches)))
    assert views.shape == (90, 2, 1, 8, 8)
    assert UNKNOWN in labels.tolist() if sampler == "shuffled" else labels.bincount().tolist() == [10] * 9
    val = next(iter(data.loader(data.validation_batch_sampler(seed=0), split="val")))[1]
    assert set(val.tolist()) == set(range(9))
    assert data.evaluation_dataset("train").fine.min() == 0


def test_image_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog", "unknown"):
        for grey in range(10):
            write_grey_image(tmp_path / name / f"{grey}.png", grey)
    config = DataConfig(
        "image_folder", root=str(tmp_path), labels="fine", image_size=8, ignore_index=2, batch_size=8,
        sampler="shuffled", test_fraction=0.2,
    )  # fmt: skip
    data = load_data(config)
    assert data.fine_names == ["cat", "dog"]
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 10
    views, labels = next(iter(data.loader(data.batch_sampler(seed=1, steps=1))))
    assert views.shape == (8, 2, 3, 8, 8)
    assert set(labels.tolist()) <= {UNKNOWN, 0, 1}


def test_official_splits_lose_the_class() -> None:
    source = read_source(DIGITS)
    half = torch.arange(len(source.train)) % 2 == 0
    parts = [source.train.select(rows.nonzero().flatten()) for rows in (half, ~half)]
    kept, unlabelled = take_out(replace(source, train=parts[0], test=parts[1]), "fine", 9)
    assert kept.test is not None
    assert kept.test.fine.max() == kept.train.fine.max() == 8
    assert len(unlabelled) == int((parts[0].fine == 9).sum())
    alone = Samples(parts[1].images[:1], parts[1].coarse[:1], torch.tensor([9]))
    with pytest.raises(
        ConfigError, match="ignore_index=9 leaves no sample of a known class in the test split"
    ):
        take_out(replace(source, test=alone), "fine", 9)


def test_errors() -> None:
    labels = r"one of the 10 labels 0 \(0\), 1 \(1\), 2 \(2\), 3 \(3\), 4 \(4\), \.\.\., got 10"
    with pytest.raises(ConfigError, match=labels):
        DataModule(replace(DIGITS, ignore_index=10))

    def parse(args: str) -> None:
        parse_args(["--data.dataset", "digits", *args.split()])

    with pytest.raises(ConfigError, match=r"loss.unlabeled=instance has no effect without data.ignore_index"):
        parse("--loss.unlabeled instance")
    with pytest.raises(
        ConfigError, match=r"loss.unlabeled=instance needs data.sampler=shuffled, got balanced"
    ):
        parse("--data.ignore_index 1 --loss.unlabeled instance")
    shuffled = "--data.ignore_index 1 --data.sampler shuffled "
    with pytest.raises(ConfigError, match=r"data.views must be at least 2, got 1"):
        parse(shuffled + "--loss.unlabeled instance --data.views 1")
    with pytest.raises(ConfigError, match=r"loss.unlabeled has no effect with loss.name=infonce"):
        parse(shuffled + "--loss.unlabeled instance --loss.name infonce")
    with pytest.raises(ConfigError, match=r"loss.gather=True needs the class of every sample"):
        parse(shuffled + "--loss.gather true")
    with pytest.raises(ConfigError, match=r"model.decoder=labelled needs the class of every sample"):
        parse(shuffled + "--model.decoder labelled --loss.reconstruction_weight 1")
    with pytest.raises(ConfigError, match=r"data.groups=annotated needs the class of every sample"):
        parse("--data.ignore_index 1 --data.groups annotated --data.sampler groups")
