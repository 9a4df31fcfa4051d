"""Samples added, removed or changed after a training: refused, as the splits would be others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pysupcon.__main__ import main
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule
from pysupcon.errors import RunError
from pysupcon.train import main as train_main
from pysupcon.trainer.run import load_run

MIXED = "the splits would mix training and test samples: restore the data"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((12, 12), 90).save(path)


def arguments(data: list[str], run: Path, *more: str) -> list[str]:
    return [
        *data, "--data.batch_size", "4", "--data.workers", "0", "--loss.name",
        "supcon", "--evaluation.evaluators", "knn", "--trainer.cpu", "true", "--trainer.best_by", "null",
        "--output_dir", str(run), *more,
    ]  # fmt: skip


def start(data: list[str], run: Path) -> None:
    """Train one epoch of two, so that the run can be resumed and evaluated."""
    assert train_main(arguments(data, run, "--trainer.epochs", "1", "--evaluate", "false")) == 0


def resume(data: list[str], run: Path) -> int:
    more = ("--trainer.epochs", "2", "--evaluate", "false", "--resume_from_checkpoint", "auto")
    return train_main(arguments(data, run, *more))


def of_folder(root: Path) -> list[str]:
    return [
        "--data.dataset", "image_folder", "--data.root", str(root), "--data.image_size", "8", "--data.labels",
        "fine",
    ]  # fmt: skip


def refused(data: list[str], run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Both a resumed training and an evaluation stop with one line."""
    capsys.readouterr()
    for action in (lambda: resume(data, run), lambda: main(["evaluate", str(run)])):
        assert action() == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "is not as it was in the training of" in line
        for word in words:
            assert word in line
    assert not (run / "evaluation").exists()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        for index in range(20):
            picture(tmp_path / f"images/{name}/{index:02d}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_images_that_were_added_removed_or_renamed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", of_folder(images)
    start(data, run)
    (images / "a/05.png").rename(tmp_path / "05.png")
    refused(data, run, capsys, "the training found 40 samples, now there are 39 samples", MIXED)
    with pytest.raises(RunError, match=MIXED):
        _ = load_run(run).data
    assert load_run(run).model is not None  # needs no sample
    (tmp_path / "05.png").rename(images / "a/05.png")
    picture(images / "b/99.png")
    refused(data, run, capsys, "the training found 40 samples, now there are 41 samples", MIXED)
    (images / "b/99.png").unlink()
    (images / "a").rename(images / "z")
    refused(data, run, capsys, "40 samples as before, but the file names or their order differ", MIXED)
    (images / "z").rename(images / "a")
    assert resume(data, run) == 0
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.slow
def test_a_moved_folder_has_the_same_samples(images: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere/moved"
    start(of_folder(images), run)
    before = load_run(run).data.splits["test"].images
    moved.parent.mkdir()
    images.rename(moved)
    assert resume(of_folder(moved), run) == 0
    after = load_run(run).data.splits["test"].images
    assert [path.name for path in before.paths] == [path.name for path in after.paths]  # type: ignore[union-attr]
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.slow
def test_a_run_without_a_record_is_read_as_before(images: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", of_folder(images)
    start(data, run)
    (run / "data.json").unlink()
    (images / "a/05.png").unlink()
    assert resume(data, run) == 0
    assert not (run / "data.json").exists()  # the first epoch saw other data
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"counts": {"train": "1"}}'])
def test_a_malformed_record_is_named(
    images: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(of_folder(images), run)
    (run / "data.json").write_text(content)
    assert main(["evaluate", str(run)]) == 1
    assert f"{run / 'data.json'} " in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_labels_of_a_table(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = images / "labels.csv"
    rows = [f"{name}/{index:02d}.png,{name}" for name in ("a", "b") for index in range(20)]
    table.write_text("\n".join(["file,label", *rows]) + "\n")
    run, data = tmp_path / "run", [*of_folder(images), "--data.table", "labels.csv"]
    start(data, run)
    text = table.read_text()
    table.write_text(text.replace("a/03.png,a", "a/03.png,b"))
    refused(data, run, capsys, "40 samples as before, but the labels differ", MIXED)
    table.write_text("\n".join(["file,label", *rows[1:10], rows[0], *rows[10:]]) + "\n")
    refused(data, run, capsys, "but the file names or their order differ", MIXED)


@pytest.mark.slow
def test_a_data_set_with_splits_of_its_own(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "split"
    for part in ("train", "val", "test"):
        shutil.copytree(images, root / part)
    run, data = tmp_path / "run", of_folder(root)
    start(data, run)
    (root / "test/a/05.png").unlink()
    remedy = f"results would be those of other data: restore the data, or delete {run / 'data.json'}"
    refused(data, run, capsys, "(train 40, val 40, test 39)", remedy)
    (run / "data.json").unlink()
    assert main(["evaluate", str(run)]) == 0


def test_features_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "features.npz", tmp_path / "run"
    features, label = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32), np.arange(60) % 2
    np.savez(file, features=features, label=label)
    data = ["--data.dataset", "arrays", "--data.root", str(file), "--data.augmentation", "noise"]
    data += ["--model.backbone", "mlp"]
    start(data, run)
    np.savez(file, features=features[:-1], label=label[:-1])
    refused(data, run, capsys, "the training found 60 samples, now there are 59 samples", MIXED)
    features[7, 3] += 1
    np.savez(file, features=features, label=label)
    refused(data, run, capsys, "60 samples as before, but the features or pixels differ", MIXED)
    with pytest.raises(RunError, match=MIXED):
        _ = load_run(run).model and load_run(run).data_of_model.normalize


def test_what_identifies_the_samples(images: Path, tmp_path: Path) -> None:
    def identity(**fields: object) -> object:
        base = {"root": str(images), "labels": "fine", "image_size": 8, "batch_size": 4}
        return DataModule(DataConfig("image_folder", **{**base, **fields})).identity  # type: ignore[arg-type]

    first = identity()
    assert identity(train_size=10, split_seed=3, ignore_index=1, image_size=16) == first
    (images / "a/00.png").write_text("damaged")
    assert identity(on_error="skip") != first
    own = torch.utils.data.TensorDataset(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2)
    config = DataConfig("passed:TensorDataset", batch_size=4)
    assert DataModule(config, own).identity.counts == {"train": 20}
    os.symlink(images, tmp_path / "link")
    assert identity(root=str(tmp_path / "link")) == first
