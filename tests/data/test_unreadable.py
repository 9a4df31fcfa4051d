"""``data.on_error: skip``: image files that cannot be read are left out, the same in every part of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_files import write_image_folder, write_text
from helpers.group_data_files import write_waterbirds
from PIL import Image
from safetensors.torch import load_file

from pysupcon.__main__ import main
from pysupcon.commands.concatenate import concatenate_runs
from pysupcon.config import Config, parse_args
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import load_data
from pysupcon.data.samples import FileImages
from pysupcon.errors import ConfigError, ImageError, RunError
from pysupcon.trainer.loop import train
from pysupcon.trainer.run import SKIPPED_FILE, load_run


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def noise(path: Path, size: tuple[int, int] = (96, 64), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path, **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 20}])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_a_check_finds_what_reading_finds(tmp_path: Path, options: dict[str, object], share: float) -> None:
    path = tmp_path / "0.jpg"
    noise(path, **options)
    cut(path, share)
    images = FileImages([path])
    reason = images.find_error(0)
    if share == 1:
        assert reason is None
        assert images[0].shape == (3, 64, 96)
    else:
        assert reason is not None
        with pytest.raises(ImageError, match=f"the image {path} cannot be read: "):
            images[0]


def test_a_jpeg_file_is_checked_at_a_part_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("pysupcon.data.samples.plain_image", lambda image, _: seen.append(image.size))
    noise(tmp_path / "0.jpg", (800, 640))
    FileImages([tmp_path / "0.jpg"]).find_error(0)
    assert seen == [(100, 80)]


def folder(root: Path, count: int = 12) -> DataConfig:
    for name in ("a", "b"):
        for index in range(count):
            noise(root / name / f"{index:02d}.jpg", (20 + index, 24))
    return DataConfig("image_folder", str(root), labels="fine", image_size=8, batch_size=4, on_error="skip")


def names(config: DataConfig, skipped: dict[str, str] | None = None) -> dict[str, list[str]]:
    data = load_data(config, None, skipped)
    return {
        split: sorted("/".join(path.parts[-2:]) for path in samples.images.paths)  # type: ignore[union-attr]
        for split, samples in data.splits.items()
    }


def test_damaged_files_are_left_out_before_the_splits(tmp_path: Path) -> None:
    config = folder(tmp_path / "all")
    shutil.copytree(tmp_path / "all", tmp_path / "good")
    cut(tmp_path / "all/a/03.jpg")
    (tmp_path / "all/b/07.jpg").write_text("no image")
    (tmp_path / "all/b/08.jpg").unlink()
    (tmp_path / "all/b/08.jpg").symlink_to("nowhere.jpg")
    data = load_data(config)
    assert data.skipped is not None
    assert set(data.skipped) == {"a/03.jpg", "b/07.jpg", "b/08.jpg"}
    assert "runcated" in data.skipped["a/03.jpg"]
    for name in data.skipped:
        (tmp_path / "good" / name).unlink()
    good = replace(config, root=str(tmp_path / "good"), on_error="stop")
    assert names(config) == names(good)
    for samples in data.splits.values():
        for index in range(len(samples)):
            assert samples.images[index].dtype == torch.uint8
    stopping = load_data(replace(config, on_error="stop")).splits.values()
    assert sum(map(len, stopping)) == 24
    with pytest.raises(ImageError, match=r"all/./0.\.jpg cannot be read"):
        [part.images[index] for part in stopping for index in range(len(part))]


def test_recorded_files_are_left_out_without_a_check(tmp_path: Path) -> None:
    """Also if they have been mended, or if the data set was moved; and other files are not read."""
    config = folder(tmp_path / "all")
    cut(tmp_path / "all/a/03.jpg")
    (tmp_path / "all").rename(tmp_path / "moved")
    moved = replace(config, root=str(tmp_path / "moved"))
    before = names(moved)
    cut(tmp_path / "moved/a/04.jpg")
    noise(tmp_path / "moved/a/03.jpg")
    assert names(moved, {"a/03.jpg": "truncated"}) == before
    assert names(moved) != before


def test_no_readable_file_is_left(tmp_path: Path) -> None:
    config = folder(tmp_path, 3)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    message = r"none of the 6 image files of the train split can be read, first a/00.jpg: cannot identify"
    with pytest.raises(ConfigError, match=message):
        load_data(config)


def test_tables(tmp_path: Path) -> None:
    """Images that a table names and that are missing count as unreadable files."""
    rows = [f"{index}.png,{index % 2},{index % 3 // 2}" for index in range(24)]
    write_text(tmp_path / "labels.csv", "\n".join(["file,cat,dog", *rows]))
    for index in range(23):
        Image.fromarray(np.full((9, 8), index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    cut(tmp_path / "5.png")
    config = DataConfig(
        "image_table", str(tmp_path), image_size=8, sampler="shuffled", batch_size=5, augmentation="none",
        on_error="skip",
    )  # fmt: skip
    data = load_data(config)
    assert set(data.skipped or ()) == {"5.png", "23.png"}
    assert sum(map(len, data.splits.values())) == 22
    for samples in data.splits.values():
        for image, label in zip(samples.images, samples.fine.tolist(), strict=True):
            index = int(image[0, 0, 0])
            assert label == [index % 2, index % 3 // 2]
    with pytest.raises(ConfigError, match="lacks 1 of the 24 images"):
        load_data(replace(config, on_error="stop"))
    write_waterbirds(tmp_path / "birds")
    cut(next((tmp_path / "birds").rglob("*_12.jpg")))
    config = DataConfig("waterbirds", str(tmp_path / "birds"), image_size=8, batch_size=4, on_error="skip")
    birds = load_data(config)
    assert len(birds.skipped or ()) == 1
    assert sum(map(len, birds.splits.values())) == 23


def test_it_needs_files() -> None:
    with pytest.raises(ConfigError, match=r"data.on_error=skip has no effect with data.dataset=digits"):
        parse_args(["--data.dataset", "digits", "--data.on_error", "skip"])


# --- in a training

ARGUMENTS = (
    "--data.dataset image_folder --data.labels fine --data.image_size 8 --data.batch_size 4 --model.width 2 "
    "--data.on_error skip --trainer.cpu true --trainer.threads 1 --evaluation.progress false "
    "--evaluation.evaluators [knn] --trainer.best_by null --optimizer.schedule constant "
    "--optimizer.warmup_epochs 0"
)


def config_of_run(root: Path, run: Path, *more: str) -> Config:
    return parse_args([*ARGUMENTS.split(), "--data.root", str(root), "--output_dir", str(run), *more])[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder(tmp_path / "images")
    for name in ("a/03.jpg", "b/07.jpg", "b/01.jpg", "b/02.jpg"):
        cut(tmp_path / "images" / name)
    return tmp_path / "images"


def test_a_training_its_evaluation_and_its_resumption_see_the_same_data(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config_of_run(root, whole, "--trainer.max_steps", "6"))
    said = capsys.readouterr().err
    assert "data.on_error=skip: 4 image file(s) cannot be read and are left out (a/03.jpg: " in said
    assert "; and 1 more)" in said
    recorded = json.loads((whole / SKIPPED_FILE).read_text())
    assert set(recorded) == {"a/03.jpg", "b/01.jpg", "b/02.jpg", "b/07.jpg"}

    train(config_of_run(root, run, "--trainer.max_steps", "3"))
    noise(root / "a/03.jpg")  # a file that has been mended stays out: the splits would change
    train(config_of_run(root, run, "--trainer.max_steps", "6", "--resume_from_checkpoint", "auto"))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert json.loads((run / SKIPPED_FILE).read_text()) == recorded
    assert main(["evaluate", str(run)]) == 0
    assert load_run(run).data.skipped == recorded
    elsewhere = tmp_path / "elsewhere"
    checkpoint = sorted((whole / "checkpoints").iterdir())[-1]
    train(
        config_of_run(
            root, elsewhere, "--trainer.max_steps", "6", "--resume_from_checkpoint", str(checkpoint)
        )
    )
    assert json.loads((elsewhere / SKIPPED_FILE).read_text()) == recorded

    both = concatenate_runs(whole, run, tmp_path / "both")
    assert load_run(both).data.skipped == recorded
    (run / SKIPPED_FILE).write_text("{}")
    with pytest.raises(RunError, match=r"the files that data.on_error=skip left out differ: .*skipped_files"):
        concatenate_runs(whole, run, tmp_path / "neither")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"skipped_files.json is missing: .*data.on_error cannot be changed after the start"),
        (
            lambda path: path.write_text("[1]"),
            r"must hold a JSON object of file names .*, got \[1\]",
        ),
        (lambda path: path.write_text("{"), r"skipped_files.json cannot be read: "),
    ],
)
def test_a_run_without_its_record(
    root: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    run = tmp_path / "run"
    train(config_of_run(root, run, "--trainer.max_steps", "2"))
    spoil(run / SKIPPED_FILE)
    with pytest.raises(RunError, match=message):
        train(config_of_run(root, run, "--trainer.max_steps", "4", "--resume_from_checkpoint", "auto"))
    with pytest.raises(RunError, match=message):
        load_run(run).data  # noqa: B018


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    folder(tmp_path / "images", 3)
    for path in (tmp_path / "images").rglob("*.jpg"):
        cut(path)
    with pytest.raises(ConfigError, match="none of the 6 image files"):
        train(config_of_run(tmp_path / "images", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_the_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of_run(root, tmp_path / "run", "--trainer.dry_run", "true"))
    assert "4 image file(s) cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_transfer(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path / "other", ["x", "y"], 10)
    train(config_of_run(tmp_path / "other", tmp_path / "run", "--trainer.max_steps", "2"))
    arguments = "--data.dataset image_folder --data.on_error skip --progress false"
    assert main(["transfer", str(tmp_path / "run"), "--data.root", str(root), *arguments.split()]) == 0
    assert "4 image file(s) cannot be read" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "run/transfer/image_folder" / SKIPPED_FILE).read_text())
    assert set(recorded) == {"a/03.jpg", "b/01.jpg", "b/02.jpg", "b/07.jpg"}
