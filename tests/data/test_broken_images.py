"""Image files that cannot be read: one line that names the file, with and without DataLoader workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.data_files import write_image_folder, write_tiny_imagenet
from PIL import Image

from pysupcon.__main__ import main
from pysupcon.config import parse_args, to_yaml
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.samples import FileImages
from pysupcon.errors import ConfigError, ImageError
from pysupcon.evaluation.features import extract_features
from pysupcon.train import main as train
from pysupcon.trainer.checkpoint import save_weights
from pysupcon.trainer.run import build_model


def break_image(path: Path, kind: str) -> None:
    """Replace a PNG file by one that cannot be read."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a dangling link":
        path.symlink_to("nowhere.png")
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        # After the signature: length, IHDR, width, height. The data of a PNG file starts at byte 41.
        changed = {
            "empty": b"",
            "text": b"no image\n" * 20,
            "truncated": content[: len(content) // 2],
            "cut in its header": content[:20],
            "damaged data": content[:45] + bytes(len(content) - 60) + content[-15:],
            "a damaged length": content[:8] + b"\xff\xff\xff\xff" + content[12:],
        }
        path.write_bytes(changed[kind])


KINDS = {
    "missing": "No such file or directory",
    "a dangling link": "No such file or directory",
    "a loop of links": "Too many levels of symbolic links",
    "a pipe": "it is not a regular file",
    "a device": "it is not a regular file",
    "a folder": "it is not a regular file",
    "empty": "cannot identify image file",
    "text": "cannot identify image file",
    "truncated": "",
    "cut in its header": "",
    "damaged data": "",
    "a damaged length": "",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_names_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "0.png"
    Image.effect_noise((40, 30), 50).save(path)
    break_image(path, kind)
    with pytest.raises(ImageError, match=f"the image {path} cannot be read: .*{KINDS[kind]}") as caught:
        FileImages([path])[0]
    assert "\n" not in str(caught.value)


def test_a_picture_above_the_limit_of_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    with pytest.raises(
        ImageError, match=r"large.png cannot be read: Image size \(1200 pixels\) exceeds limit"
    ):
        FileImages([tmp_path / "large.png"])[0]


def folder_data(root: Path, workers: int) -> DataModule:
    write_image_folder(root, ["a", "b"], 10)
    return load_data(
        DataConfig("image_folder", str(root), labels="fine", image_size=8, batch_size=4, workers=workers)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_features_and_batches(tmp_path: Path, workers: int) -> None:
    data = folder_data(tmp_path, workers)
    for samples in data.splits.values():
        for path in samples.images.paths:  # type: ignore[union-attr]
            break_image(path, "truncated")
    message = rf"^the image {tmp_path}/[ab]/\d\.png cannot be read: [^\n]+$"
    with pytest.raises(ImageError, match=message):
        extract_features(
            torch.flatten, data.evaluation_dataset("test"), batch_size=2, device=torch.device("cpu"),
            workers=workers,
        )  # fmt: skip
    with pytest.raises(ImageError, match=message):
        list(data.loader(data.batch_sampler(seed=0, steps=2)))


ARGUMENTS = (
    "--data.dataset image_folder --data.labels fine --data.image_size 8 --data.batch_size 4 "
    "--model.width 2 --trainer.epochs 1 --trainer.cpu true --evaluation.progress false"
)


def test_the_commands_print_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, run = tmp_path / "images", tmp_path / "run"
    write_image_folder(root, ["a", "b"], 10)
    for path in root.rglob("*.png"):
        break_image(path, "a pipe")
    arguments = [*ARGUMENTS.split(), "--data.root", str(root)]
    assert train([*arguments, "--output_dir", str(run)]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train.py: error: data.root '{root}': 6 of the 6 image files of the val and test")
    assert last.endswith("--data.on_error skip")
    # The files of the training split are read when they are needed.
    only_training = ["--evaluate", "false", "--trainer.best_by", "null"]
    assert train([*arguments, *only_training, "--output_dir", str(run)]) == 1
    lines = capfd.readouterr().err.splitlines()
    start = f"train.py: error: the image {root}/"
    assert [line for line in lines if "rror" in line] == [line for line in lines if line.startswith(start)]
    assert lines[-1].endswith(".png cannot be read: it is not a regular file")

    config = parse_args(arguments)[0]
    run.mkdir()  # a start that fails leaves no folder
    (run / "config.yaml").write_text(to_yaml(config))
    save_weights(build_model(config, load_data(config.data)).state_dict(), run / "model.safetensors")
    assert main(["evaluate", str(run)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pysupcon evaluate: the image {root}/")


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = DataConfig("image_folder", str(tmp_path / "file"), labels="fine", image_size=8)
    with pytest.raises(ConfigError, match=r"file' is not an image folder .*: Not a directory"):
        load_data(config)


def test_a_table_that_is_a_pipe(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    (tmp_path / "words.txt").unlink()
    os.mkfifo(tmp_path / "words.txt")
    config = DataConfig("tiny_imagenet", str(tmp_path))
    with pytest.raises(ConfigError, match=r"words.txt cannot be read: it is not a regular file"):
        load_data(config)
