"""Data sets read by torchvision: CIFAR and its variants, and six data sets for transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from pysupcon.data import superclasses
from pysupcon.data.config import DOWNLOADABLE_DATASETS, DataConfig
from pysupcon.data.samples import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileImages,
    Samples,
    Source,
    identity_superclasses,
    missing_data_error,
    samples_from_images,
)
from pysupcon.errors import ConfigError

#: CIFAR100-U (Chen et al. 2022): training samples per class of a superclass, by ascending label.
CIFAR100_U_SIZES = (500, 250, 100, 50, 50)


def cifar(config: DataConfig) -> Source:
    """Reads CIFAR-10, CIFAR-100, CIFAR-2 (cats and dogs) or CIFAR100-U (unbalanced within a superclass)."""
    assert config.root is not None
    is_cifar10 = config.dataset in ("cifar10", "cifar2")
    dataset_class = datasets.CIFAR10 if is_cifar10 else datasets.CIFAR100
    coarse = superclasses.CIFAR10 if is_cifar10 else superclasses.CIFAR100
    parts = []
    names: list[str] = []
    for train in (True, False):
        try:  # torchvision checks checksums before it unpickles
            part = dataset_class(str(Path(config.root).expanduser()), train=train, download=config.download)
        except RuntimeError as error:
            if config.download:
                raise
            raise missing_data_error(
                config, f"{dataset_class.base_folder} with torchvision's checksums"
            ) from error
        names = list(part.classes)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        fine = torch.tensor(part.targets, dtype=torch.int64)
        if config.dataset == "cifar2":
            cat_and_dog = [names.index(name) for name in superclasses.CIFAR2]
            rows = torch.isin(fine, torch.tensor(cat_and_dog))
            names, coarse = superclasses.CIFAR2, identity_superclasses(superclasses.CIFAR2)
            images, fine = images[rows], (fine[rows] == cat_and_dog[1]).long()
        parts.append(samples_from_images(images, fine, names, coarse))
    mean = (0.4914, 0.4822, 0.4465) if is_cifar10 else (0.5071, 0.4866, 0.4409)
    std = (0.2470, 0.2435, 0.2616) if is_cifar10 else (0.2673, 0.2564, 0.2762)
    sizes = _cifar100_u_sizes(names, coarse) if config.dataset == "cifar100_u" else None
    return Source(parts[0], parts[1], names, list(coarse), "colour", 3, 32, mean, std, max_per_class=sizes)


def _cifar100_u_sizes(names: list[str], coarse: dict[str, list[str]]) -> list[int]:
    sizes = [0] * len(names)
    for members in coarse.values():
        for label, count in zip(sorted(names.index(name) for name in members), CIFAR100_U_SIZES, strict=True):
            sizes[label] = count
    return sizes


# --- transfer -----------------------------------------------------------------------------------------------

#: torchvision class, names of the official training splits, and expected files under ``data.root``.
_TRANSFER_READERS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "aircraft": (datasets.FGVCAircraft, ("trainval",), "fgvc-aircraft-2013b/data"),
    "cars": (
        datasets.StanfordCars,
        ("train",),
        "stanford_cars with cars_train, cars_test, devkit and cars_test_annos_withlabels.mat",
    ),
    "dtd": (datasets.DTD, ("train", "val"), "dtd/dtd with images and labels"),
    "flowers102": (
        datasets.Flowers102,
        ("train", "val"),
        "flowers-102 with jpg, and imagelabels.mat and setid.mat with torchvision's checksums",
    ),
    "food101": (datasets.Food101, ("train",), "food-101 with images and meta"),
    "pets": (datasets.OxfordIIITPet, ("trainval",), "oxford-iiit-pet with images and annotations"),
}


def transfer_dataset(config: DataConfig) -> Source:
    """Reads FGVC Aircraft, Stanford Cars, DTD (first partition), Oxford Flowers, Food-101 or Oxford-IIIT Pet.

    The official training and validation samples are the training samples. The coarse class is the
    manufacturer of an aircraft and the species of a pet; the other data sets have no superclasses.
    """
    assert config.image_size is not None
    dataset_class, train_splits, expected = _TRANSFER_READERS[config.dataset]
    train, fine, coarse = _read(config, dataset_class, train_splits, expected)
    test, *test_names = _read(config, dataset_class, ("test",), expected)
    if test_names != [fine, coarse]:
        raise ConfigError(f"data.root {config.root!r}: the test split of {config.dataset} has other classes")
    return Source(
        train, test, fine, coarse, "colour", 3, config.image_size, IMAGENET_MEAN, IMAGENET_STD
    )  # fmt: skip


def _read(
    config: DataConfig, dataset_class: Any, splits: tuple[str, ...], expected: str
) -> tuple[Samples, list[str], list[str]]:
    assert config.root is not None
    root = Path(config.root).expanduser()
    download = {"download": True} if config.download and config.dataset in DOWNLOADABLE_DATASETS else {}
    paths: list[Path] = []
    fine: list[int] = []
    coarse: list[int] = []
    names = coarse_names = [""]
    try:
        for split in splits:
            if config.dataset == "pets":  # has no loader argument
                part = dataset_class(root, split=split, **download)
                paths += part._images
                labels, coarser = part._labels, part._bin_labels
                coarse_names = list(part.bin_classes)
            else:  # this loader returns the path, so that no image is decoded here
                part = dataset_class(root, split=split, loader=Path, **download)
                found = [part[row] for row in range(len(part))]
                paths += [path for path, _ in found]
                labels = coarser = [int(label) for _, label in found]
                coarse_names = list(part.classes)
            names = list(part.classes)
            if config.dataset == "aircraft":
                makers = dataset_class(root, split=split, annotation_level="manufacturer", loader=Path)
                coarser = [makers[row][1] for row in range(len(makers))]
                coarse_names = list(makers.classes)
            fine += labels
            coarse += coarser
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if download:
            raise
        raise missing_data_error(config, f"{expected} in {root} ({error})") from error
    missing = [path for path in paths if not path.is_file()]
    if (missing and config.on_error == "stop") or not paths:
        raise ConfigError(
            f"data.root {config.root!r} lacks {len(missing)} of the {len(paths)} images of {config.dataset}"
            + (f", first {missing[0]}" if missing else "")
        )
    return Samples(FileImages(paths), torch.tensor(coarse), _tensor(fine)), names, coarse_names


def _tensor(labels: list[int]) -> Tensor:
    return torch.tensor(labels, dtype=torch.int64)
