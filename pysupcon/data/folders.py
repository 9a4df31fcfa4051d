"""Data sets in folders of image files: any image folder, Tiny ImageNet and ImageNet-100."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from pysupcon.data.config import DataConfig
from pysupcon.data.image_files import describe_left_out, is_hidden, scan
from pysupcon.data.imagenet_classes import IMAGENET100, TINY_IMAGENET
from pysupcon.data.labelled_table import labelled_table
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
from pysupcon.data.tables import SPLIT_NAMES
from pysupcon.errors import ConfigError
from pysupcon.reading import check_regular, one_line

_SPLIT_FOLDERS = {name: ("train", "val", "test")[number] for name, number in SPLIT_NAMES.items()}
_SPLIT_FOLDERS |= {"training": "train", "testing": "test"}


def image_folder(config: DataConfig) -> Source:
    """Reads ROOT/CLASS/*.png, or ROOT/train/CLASS and ROOT/test/CLASS and ROOT/val/CLASS (or validation).

    Without a test folder, the val folder is the test split, as in ImageNet's and timm's layout, and a
    validation split is held out of the training images. Classes may be nested: ROOT/COARSE/FINE/*.png.
    Hidden folders and files are left out, and so are files that are no images; the notes of the source say
    how many. With ``data.table``, a table gives the images and their labels.

    Raises:
        ConfigError: it is no such folder, some classes are nested and others are not, or the splits have
            other classes.
    """
    assert config.root is not None
    assert config.image_size is not None
    if config.table is not None:
        return labelled_table(config)
    root = Path(config.root).expanduser()
    folders = _split_folders(root)
    left_out: Counter[str] = Counter()
    if not folders:
        names, paths, fine = scan(root, left_out)
        outer = sorted({name.split("/")[0] for name in names})
        splits = [name for name in outer if name.lower() in _SPLIT_FOLDERS]
        if splits:
            raise ConfigError(
                f"data.root {root} has folders called {', '.join(splits)}, which are names of splits: it "
                "must hold train and val or test, and no other folder, or class folders only"
            )
        coarse = _superclasses(config, names)
        samples = samples_from_files(paths, fine, names, coarse)
        source = _source(samples, None, names, list(coarse), config.image_size)
        return replace(source, notes=describe_left_out(root, left_out))
    if config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: data.root {root} has a test folder; leave it out"
        )
    names, paths, fine = scan(folders["train"], left_out)
    coarse = _superclasses(config, names)
    parts = {"train": samples_from_files(paths, fine, names, coarse)}
    for split in sorted(set(folders) - {"train"}):
        found, paths, fine = scan(folders[split], left_out)
        if found != names:
            raise ConfigError(f"data.root: {folders[split]} has the classes {found}, train has {names}")
        parts[split] = samples_from_files(paths, fine, names, coarse)
    val = parts.get("val") if "test" in parts else None
    return Source(
        parts["train"], parts.get("test", parts.get("val")), names, list(coarse), "colour", 3,
        config.image_size, IMAGENET_MEAN, IMAGENET_STD, val,
        notes=describe_left_out(root, left_out),
    )  # fmt: skip


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits, if ROOT holds train, val or test, and no other folder."""
    try:
        found = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    except OSError:  # scan raises the error
        return {}
    splits = [path for path in found if path.name.lower() in _SPLIT_FOLDERS]
    kinds = {_SPLIT_FOLDERS[path.name.lower()]: path for path in splits}
    if "train" not in kinds or len(kinds) < 2 or len(splits) < len(found):
        return {}
    if len(kinds) < len(splits):
        names = ", ".join(path.name for path in splits)
        raise ConfigError(f"data.root {root} must hold each split once, it has {names}")
    return kinds


def _source(train: Samples, test: Samples | None, fine: list[str], coarse: list[str], size: int) -> Source:
    return Source(train, test, fine, coarse, "colour", 3, size, IMAGENET_MEAN, IMAGENET_STD)


def _superclasses(config: DataConfig, names: list[str]) -> dict[str, list[str]]:
    if config.coarse_map is None:
        if not all("/" in name for name in names):
            return identity_superclasses(names)
        nested: dict[str, list[str]] = {}
        for name in names:
            nested.setdefault(name.split("/")[0], []).append(name)
        return nested
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
