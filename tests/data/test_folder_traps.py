"""Image folders that could be read in a way that their author did not mean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_files import write_grey_image, write_image_folder
from PIL import Image
from torchvision.datasets import ImageFolder

from pysupcon import train as entry
from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data
from pysupcon.data.image_files import scan
from pysupcon.data.samples import FileImages
from pysupcon.errors import ConfigError


def read(root: Path, **changes: Any) -> DataModule:
    return load_data(DataConfig("image_folder", root=str(root), image_size=8, batch_size=4, **changes))


def count(data: DataModule) -> int:
    return sum(map(len, data.splits.values()))


def test_every_ending_of_images_is_read(tmp_path: Path) -> None:
    endings = ("gif", "jfif", "webp", "BMP", "tif", "pgm", "jpg")
    for name in ("cat", "dog"):
        for ending in endings:
            path = tmp_path / name / f"{ending}.{ending}"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (9, 8), 40).save(path, format="JPEG" if ending == "jfif" else None)
    data = read(tmp_path)
    assert count(data) == 2 * len(endings)
    assert not data.notes
    images = torch.stack([image for part in data.splits.values() for image in part.images])
    assert torch.equal(images, torch.full((14, 3, 8, 9), 40, dtype=torch.uint8))


def test_the_first_picture_of_an_animated_file(tmp_path: Path) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    (pixels,) = FileImages([tmp_path / "a.gif"])
    assert pixels[:, 4, 4].tolist() == [250, 0, 0]
    (tmp_path / "a.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:20])
    assert FileImages([tmp_path / "a.gif"]).find_error(0) is not None


def test_files_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(tmp_path, ["cat", "dog"], 10)
    for quiet in ("Thumbs.db", ".DS_Store", "labels.csv", "a.txt", "a.json", "README", ".hidden/a.heic"):
        (tmp_path / "cat" / quiet).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / quiet).touch()
    assert not read(tmp_path).notes
    for name in ("cat", "dog"):
        for number in range(3):
            (tmp_path / name / f"{number}.HEIC").touch()
    (tmp_path / "dog" / "12345").touch()
    write_grey_image(tmp_path / "loose.png", 0)
    data = read(tmp_path)
    assert count(data) == 20
    (note,) = data.notes
    kinds = ".heic (6), images beside the class folders (1), no ending (1)"
    assert f"{tmp_path}: 8 files were left out: " in note
    assert all(kind in note for kind in kinds.split(", "))
    assert note.endswith("Images are files with .jpg, .jpeg, .jfif, .png, .gif, .webp, .bmp, .tif, .tiff, "
                         ".ppm, .pgm")  # fmt: skip
    entry.run(
        data={"dataset": "image_folder", "root": str(tmp_path), "image_size": 8, "batch_size": 4},
        model={"width": 2}, trainer={"max_steps": 1, "cpu": True, "threads": 1}, evaluate=False,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert capsys.readouterr().err.count("8 files were left out: .heic (6)") == 1


def test_files_that_are_left_out_of_splits_and_nested_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image_folder(tmp_path / split / "pet", ["cat", "dog"], 10)
        (tmp_path / split / "pet" / "cat" / "0.avif").touch()
        (tmp_path / split / "pet" / "0.avif").touch()
    data = read(tmp_path)
    assert data.fine_names == ["pet/cat", "pet/dog"]
    assert "4 files were left out: .avif (4)." in data.notes[0]


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("stray", ["b/stray.png", "b/stray.GIF", "a/stray.png", "c/0.png"])
def test_classes_of_which_some_are_nested(tmp_path: Path, stray: str, splits: bool) -> None:
    top = tmp_path / "train" if splits else tmp_path
    write_image_folder(top / "a", ["x", "y"], 10)
    write_image_folder(top / "b", ["x", "z"], 10)
    if splits:
        write_image_folder(tmp_path / "test" / "a", ["x", "y"], 3)
        write_image_folder(tmp_path / "test" / "b", ["x", "z"], 3)
    assert read(tmp_path).fine_names == ["a/x", "a/y", "b/x", "b/z"]
    write_grey_image(top / stray, 0)
    with pytest.raises(ConfigError, match=rf"has folders only, but there is the image {stray}. Move the"):
        read(tmp_path)


def test_folders_inside_classes(tmp_path: Path) -> None:
    """Where every class has images of its own, the folders in it are no classes."""
    for name in ("a", "b"):
        write_image_folder(tmp_path / name, ["x"], 5)
        write_grey_image(tmp_path / name / "0.png", 0)
    data = read(tmp_path)
    assert (data.fine_names, count(data)) == (["a", "b"], 12)


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    for name in ("b", "a", "B"):
        for folder in ("", "x", "x y", "x/z", "X"):
            write_image_folder(tmp_path / name, [folder], 3)
    expected = ImageFolder(str(tmp_path))
    names, paths, labels = scan(tmp_path, Counter())
    assert names == expected.classes
    assert [
        (str(path), label) for path, label in zip(paths, labels.tolist(), strict=True)
    ] == expected.samples


def test_a_class_without_images(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ["a", "b"], 5)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".0.png").touch()
    with pytest.raises(ConfigError, match=r"Found no image in .*/c; images are files with .jpg, "):
        read(tmp_path)
