"""Data sets in folders of image files: any image folder, Tiny ImageNet and ImageNet-100."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pysupcon.data.config import DataConfig
from pysupcon.data.imagenet_classes import IMAGENET100, TINY_IMAGENET
from pysupcon.data.samples import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileImages,
    Samples,
    Source,
    identity_superclasses,
    missing_data_error,
    samples_from_files,
)
from pysupcon.errors import ConfigError
from pysupcon.reading import check_regular, one_line


def image_folder(config: DataConfig) -> Source:
    """Reads ROOT/CLASS/*.png, or ROOT/train/CLASS and ROOT/test/CLASS."""
    assert config.root is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    has_test = (root / "train").is_dir() and (root / "test").is_dir()
    if has_test and config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: data.root {root} has a test folder; leave it out"
        )
    train_root = root / "train" if has_test else root
    names, paths, fine = _scan(train_root)
    coarse = _superclasses(config, names)
    train = samples_from_files(paths, fine, names, coarse)
    test = None
    if has_test:
        test_names, test_paths, test_fine = _scan(root / "test")
        if test_names != names:
            raise ConfigError(f"data.root: {root / 'test'} has the classes {test_names}, train has {names}")
        test = samples_from_files(test_paths, test_fine, names, coarse)
    return _source(train, test, names, list(coarse), config.image_size)


def _source(train: Samples, test: Samples | None, fine: list[str], coarse: list[str], size: int) -> Source:
    return Source(train, test, fine, coarse, "colour", 3, size, IMAGENET_MEAN, IMAGENET_STD)


def _scan(root: Path) -> tuple[list[str], list[Path], Tensor]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        names, indices = find_classes(root)
        found = make_dataset(root, indices, extensions=IMG_EXTENSIONS)
    except OSError as error:
        reason = one_line(error)
        raise ConfigError(
            f"data.root {str(root)!r} is not an image folder (FOLDER/CLASS/*.png): {reason}"
        ) from error
    return names, [Path(path) for path, _ in found], torch.tensor([label for _, label in found])


def _superclasses(config: DataConfig, names: list[str]) -> dict[str, list[str]]:
    if config.coarse_map is None:
        return identity_superclasses(names)
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


def imagenet100(config: DataConfig) -> Source:
    """Reads ROOT/train/WNID and ROOT/val/WNID, the test split; other classes are ignored."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    assert config.root is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    indices = {wnid: index for index, wnid in enumerate(IMAGENET100)}
    parts = []
    for folder in ("train", "val"):
        try:
            found = make_dataset(root / folder, indices, extensions=IMG_EXTENSIONS)
        except OSError as error:
            wanted = f"images of all {len(indices)} classes in {root / folder}/WNID ({one_line(error)})"
            raise missing_data_error(config, wanted) from error
        labels = torch.tensor([label for _, label in found])
        parts.append(Samples(FileImages([Path(path) for path, _ in found]), labels, labels))
    return _source(parts[0], parts[1], IMAGENET100, IMAGENET100, config.image_size)


def tiny_imagenet(config: DataConfig) -> Source:
    """Reads Tiny ImageNet as published.

    ROOT or ROOT/tiny-imagenet-200 holds wnids.txt, words.txt, train/WNID/images/*.JPEG, val/images/*.JPEG and
    val/val_annotations.txt. The published validation images are the test split, because the published test
    images have no labels. Fine labels are positions in the sorted wnids, as in torchvision.
    """
    assert config.root is not None
    places = [Path(config.root).expanduser(), Path(config.root).expanduser() / "tiny-imagenet-200"]
    root = next((place for place in places if (place / "wnids.txt").is_file()), None)
    if root is None:
        raise missing_data_error(config, "wnids.txt in " + " or ".join(map(str, places)))
    wnids = sorted(_lines(root / "wnids.txt"))
    known = {wnid for members in TINY_IMAGENET.values() for wnid in members}
    if set(wnids) != known or len(wnids) != len(known):
        raise ConfigError(
            f"data.root: {root / 'wnids.txt'} must list the {len(known)} classes of Tiny ImageNet, got "
            f"{len(wnids)}, {len(known - set(wnids))} of them missing"
        )
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[Path] = []
    labels: list[int] = []
    for wnid in wnids:
        found = sorted((root / "train" / wnid / "images").glob("*.JPEG"))
        if not found:
            raise missing_data_error(config, f"*.JPEG in {root / 'train' / wnid / 'images'}")
        paths += found
        labels += [label_of[wnid]] * len(found)
    train = samples_from_files(paths, torch.tensor(labels), wnids, TINY_IMAGENET)
    test_paths, test_labels = _annotations(root / "val", label_of)
    test = samples_from_files(test_paths, torch.tensor(test_labels), wnids, TINY_IMAGENET)
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    return _source(train, test, names, list(TINY_IMAGENET), config.image_size or 64)


def _lines(path: Path) -> list[str]:
    try:
        check_regular(path)  # a pipe would block
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {one_line(error)}") from error


def _annotations(folder: Path, label_of: dict[str, int]) -> tuple[list[Path], list[int]]:
    """Images of ``val`` and their labels, from tab-separated lines of file name, wnid and box."""
    table = folder / "val_annotations.txt"
    paths, labels = [], []
    for number, line in enumerate(_lines(table), start=1):
        name, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in label_of:
            raise ConfigError(
                f"data.root: {table}, line {number}, must start with a file name and one of the wnids, "
                f"got {line!r}"
            )
        paths.append(folder / "images" / name)
        labels.append(label_of[wnid])
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ConfigError(
            f"data.root: {table} names {len(paths)} images, {len(missing)} of which are missing"
            + (f", first {missing[0]}" if missing else "")
        )
    return paths, labels
