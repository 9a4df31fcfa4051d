"""Damaged files of the validation and test splits are found before the first step, not after the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pysupcon.config import Config, parse_args
from pysupcon.data.datamodule import load_data
from pysupcon.errors import ConfigError
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import LOG_FILE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((12, 12), 90).save(tmp_path / "images" / part / name / f"{index}.png")
    return tmp_path / "images"


def config(root: Path, *more: str) -> Config:
    return parse_args([
        "--data.dataset", "image_folder", "--data.root", str(root), "--data.image_size", "8",
        "--data.labels", "fine", "--data.batch_size", "4", "--data.workers", "0", "--trainer.epochs", "1",
        "--trainer.cpu", "true", "--evaluation.evaluators", "knn", "--output_dir", str(root.parent / "run"),
        *more,
    ])[0]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("test", ["--trainer.best_by", "null"]),
        ("val", ["--trainer.best_by", "null"]),
        ("val", ["--evaluate", "false", "--trainer.best_by", "loss"]),
    ],
)
def test_a_damaged_file_ends_the_training_before_its_first_step(
    root: Path, part: str, more: list[str]
) -> None:
    path = root / part / "a/1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ConfigError, match=f"first {part}/a/1.png: .*--data.on_error skip"):
        train(config(root, *more))
    assert not (root.parent / "run" / LOG_FILE).exists()


def test_files_that_nothing_reads_are_not_checked(root: Path) -> None:
    (root / "test/a/1.png").write_text("damaged")
    (root / "val/a/1.png").write_text("damaged")
    unused = ["--evaluate", "false", "--trainer.best_by", "null"]
    assert (train(config(root, *unused)) / LOG_FILE).exists()


def test_a_resumed_training_does_not_check_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("pysupcon.trainer.data.check_readable", lambda splits, _: read.extend(splits))
    train(config(root, "--trainer.best_by", "null"))
    assert read == ["val", "test"]
    train(
        config(root, "--trainer.best_by", "null", "--trainer.epochs", "2", "--resume_from_checkpoint", "auto")
    )
    assert read == ["val", "test"]


def test_data_without_files_are_not_read(root: Path) -> None:
    from pysupcon.data.config import DataConfig
    from pysupcon.data.unreadable import check_readable

    check_readable(load_data(DataConfig("digits", batch_size=16)).splits, "nowhere")
