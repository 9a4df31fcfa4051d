"""Image files of all modes, through the data sets that read files: what the trainer sees of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_files import write_text
from PIL import Image
from torch import Tensor

from pysupcon.data.config import DataConfig
from pysupcon.data.datamodule import DataModule, load_data

SIZE = 16
COUNT = 12


def folder(root: Path, suffix: str, write: Callable[[Path], None]) -> DataConfig:
    for index in range(COUNT):
        path = root / "ab"[index % 2] / f"{index}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    return DataConfig("image_folder", str(root), labels="fine")


def image_table(root: Path, suffix: str, write: Callable[[Path], None]) -> DataConfig:
    folder(root, suffix, write)
    rows = [f"{'ab'[index % 2]}/{index}{suffix},{index % 2},1" for index in range(COUNT)]
    write_text(root / "labels.csv", "\n".join(["file,x,y", *rows]))
    return DataConfig("image_table", str(root), sampler="shuffled")


def labelled_table(root: Path, suffix: str, write: Callable[[Path], None]) -> DataConfig:
    folder(root, suffix, write)
    rows = [f"{'ab'[index % 2]}/{index}{suffix},{index % 2}" for index in range(COUNT)]
    write_text(root / "labels.csv", "\n".join(["file,label", *rows]))
    return DataConfig("image_folder", str(root), table="labels.csv")


WRITERS = {"image_folder": folder, "image_table": image_table, "image_folder with a table": labelled_table}


def seen(data: DataModule) -> Tensor:
    """All images as a batch of the training has them: uint8 [N, 3, H, W], equal."""
    views, _ = next(iter(data.loader(data.batch_sampler(seed=0, steps=1))))
    assert views.dtype == torch.uint8
    assert views.shape[2:] == (3, SIZE, SIZE)
    rows = views.flatten(0, 1)
    assert torch.equal(rows, rows[:1].expand_as(rows))
    return rows[0]


def ramp_of_16_bits(path: Path) -> None:
    """From black at the left to white at the right, in 16 bits of grey."""
    row = np.linspace(0, 65_535, SIZE).round().astype(np.uint16)
    Image.fromarray(np.tile(row, (SIZE, 1))).save(path)


def middle_of_16_bits(path: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 127 * 257, dtype=np.uint16)).save(path)


def with_alpha(mode: str) -> Callable[[Path], None]:
    """The left half is opaque and dark, the right half is transparent and dark."""

    def write(path: Path) -> None:
        image = Image.new(mode, (SIZE, SIZE), (40,) * (len(mode) - 1) + (255,))
        image.paste((40,) * (len(mode) - 1) + (0,), (SIZE // 2, 0, SIZE, SIZE))
        image.save(path)

    return write


def transparent_palette(path: Path) -> None:
    """Entry 0 is dark, entry 1 is transparent."""
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([40, 40, 40, 200, 0, 0])
    image.paste(1, (SIZE // 2, 0, SIZE, SIZE))
    image.save(path, transparency=1)


def transparent_colour(path: Path) -> None:
    """A PNG file without alpha, one of whose colours counts as transparent."""
    image = Image.new("RGB", (SIZE, SIZE), (40, 40, 40))
    image.paste((1, 2, 3), (SIZE // 2, 0, SIZE, SIZE))
    image.save(path, transparency=(1, 2, 3))


def plain(mode: str, colour: tuple[int, ...] | int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.new(mode, (SIZE, SIZE), colour).save(path)

    return write


def palette(path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).convert("P").save(path)


HALVES = [[40] * (SIZE // 2) + [255] * (SIZE // 2)] * 3
"""Channels of a row that is dark at the left and white at the right"""
CASES: dict[str, tuple[str, Callable[[Path], None], list[list[int]]]] = {
    "a ramp of 16 bits": (".png", ramp_of_16_bits, [[17 * k for k in range(SIZE)]] * 3),
    "16 bits": (".png", middle_of_16_bits, [[127] * SIZE] * 3),
    "16 bits, TIFF": (".tif", middle_of_16_bits, [[127] * SIZE] * 3),
    "8 bits": (".png", plain("L", 127), [[127] * SIZE] * 3),
    "1 bit": (".png", plain("1", 1), [[255] * SIZE] * 3),
    "RGBA": (".png", with_alpha("RGBA"), HALVES),
    "LA": (".png", with_alpha("LA"), HALVES),
    "transparent palette": (".png", transparent_palette, HALVES),
    "transparent colour": (".png", transparent_colour, HALVES),
    "palette": (".png", palette, [[255] * SIZE, [0] * SIZE, [0] * SIZE]),
    "CMYK without ink": (".jpg", plain("CMYK", (0, 0, 0, 0)), [[255] * SIZE] * 3),
    "CMYK with black ink": (".jpg", plain("CMYK", (0, 0, 0, 255)), [[0] * SIZE] * 3),
    "CMYK with cyan ink": (".tif", plain("CMYK", (255, 0, 0, 0)), [[0] * SIZE, [255] * SIZE, [255] * SIZE]),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("case", CASES)
def test_modes(tmp_path: Path, kind: str, case: str) -> None:
    suffix, write, expected = CASES[case]
    config = WRITERS[kind](tmp_path, suffix, write)
    config.image_size, config.batch_size, config.augmentation = SIZE, 4, "none"
    image = seen(load_data(config))
    assert image[:, 0].tolist() == expected
    assert torch.equal(image, image[:, :1].expand_as(image))  # all rows are equal


def test_a_ramp_of_16_bits_has_the_mean_of_its_8_bits(tmp_path: Path) -> None:
    """Its upper byte alone, or clipping at 255, gives another mean."""
    random = np.random.default_rng(0).integers(0, 65_536, (SIZE, SIZE)).astype(np.uint16)
    config = folder(tmp_path, ".png", lambda path: Image.fromarray(random).save(path))
    config.image_size, config.batch_size, config.augmentation = SIZE, 4, "none"
    image = seen(load_data(config))[0]
    assert image.double().mean() == pytest.approx(random.mean() / 257, abs=0.05)
    assert np.array_equal(image.numpy(), np.rint(random / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation(tmp_path: Path, kind: str, suffix: str, orientation: int, turns: int) -> None:
    """Stored with black at the left and white at the right."""
    stored = np.zeros((16, 32), dtype=np.uint8)
    stored[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation

    def write(path: Path) -> None:
        Image.fromarray(stored).convert("RGB").save(path, exif=exif)

    config = WRITERS[kind](tmp_path, suffix, write)
    config.image_size, config.batch_size, config.augmentation = SIZE, 4, "none"
    data = load_data(config)
    expected = np.rot90(stored, turns)
    for samples in data.splits.values():
        image = samples.images[0]
        assert image.shape == (3, *expected.shape)
        assert np.abs(image[0].numpy().astype(int) - expected).max() < 8  # JPEG
