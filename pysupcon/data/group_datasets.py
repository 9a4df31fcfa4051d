"""Data sets of a class and a spurious attribute, in their usual layouts: an image folder and a table.

The coarse label is the class, used for training. The fine label is the group, a pair of class and attribute,
used by the evaluators of robustness.

waterbirds  ROOT/metadata.csv (img_filename, y, place, split); images under ROOT (Sagawa et al. 2020). Class:
            landbird or waterbird; attribute: land or water background.
celeba      ROOT/list_attr_celeba.{csv,txt} and list_eval_partition.{csv,txt}; images in ROOT/img_align_celeba
            (Liu et al. 2015; the layouts of the authors, torchvision and Kaggle). Class:
            Blond_Hair; attribute: Male.
isic        ROOT/metadata.csv (isic_id or image_name; benign_malignant, or target 0/1; patch 0/1; optional
            split); images under ROOT, ROOT/images or ROOT/train. Class: benign or malignant; attribute: with
            or without a coloured patch (Rieger et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pysupcon.data.tables import SPLITS, Table, check_images, make_table, read_csv
from pysupcon.errors import ConfigError

GroupDataset = Literal["waterbirds", "celeba", "isic"]
GROUP_DATASETS: tuple[GroupDataset, ...] = ("waterbirds", "celeba", "isic")
_BINARY = {"0": 0, "1": 1, "-1": 0, "false": 0, "true": 1, "no": 0, "yes": 1}
_DIAGNOSES = _BINARY | {"benign": 0, "malignant": 1}
_EXTENSIONS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class GroupTable:
    """Labels of every image in the table.

    Attributes:
        paths: the N image files.
        classes, attributes: [N] int64.
        split: [N] int64, 0 train, 1 validation, 2 test; None without a split column.
        class_names, attribute_names: names of the labels.
    """

    paths: list[Path]
    classes: Tensor
    attributes: Tensor
    split: Tensor | None
    class_names: list[str]
    attribute_names: list[str]

    @property
    def groups(self) -> Tensor:
        """[N] int64: class * number of attributes + attribute."""
        return self.classes * len(self.attribute_names) + self.attributes

    @property
    def group_names(self) -> list[str]:
        """Names of the groups, by their numbers."""
        return [f"{name}, {attribute}" for name in self.class_names for attribute in self.attribute_names]


def read_group_table(
    dataset: GroupDataset, root: str | Path, on_error: Literal["stop", "skip"] = "stop"
) -> GroupTable:
    """Read the table of a data set and, unless ``on_error`` is "skip", check that its images exist.

    Raises:
        ConfigError: a file, column or image is missing, or a value is not allowed; names file, row, column.
    """
    readers: dict[str, Callable[[Path], GroupTable]] = {
        "waterbirds": _waterbirds,
        "celeba": _celeba,
        "isic": _isic,
    }
    table = readers[dataset](Path(root).expanduser())
    if not table.paths:
        raise ConfigError(f"data.root {str(root)!r}: the table of {dataset} holds no image")
    check_images(root, table.paths, on_error)
    return table


def _find(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ConfigError(f"data.root {str(root)!r} holds no {' or '.join(names)}")


def _waterbirds(root: Path) -> GroupTable:
    rows = read_csv(_find(root, "metadata.csv"))
    return GroupTable(
        rows.files("img_filename", root),
        rows.labels({"0": 0, "1": 1}, "y"),
        rows.labels({"0": 0, "1": 1}, "place"),
        rows.labels(SPLITS, "split"),
        ["landbird", "waterbird"],
        ["on land", "on water"],
    )


def _read_celeba(path: Path, columns: list[str] | None) -> Table:
    """Reads a CSV file, or the published text form: for attributes a count, a line of names, then rows."""
    if path.suffix == ".csv":
        return read_csv(path)
    try:
        text = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error}") from error
    numbers = [number for number, line in enumerate(text, start=1) if line.strip()]
    lines = [line.split() for line in text if line.strip()]
    if columns is not None:
        return make_table(path, columns, lines, numbers)
    if len(lines) < 2 or len(lines[0]) != 1 or lines[0][0] != str(len(lines) - 2):
        raise ConfigError(
            f"data.root: {path} must start with the number of its rows, {len(lines) - 2}, and the names of "
            f"its attributes; it starts with {' '.join(lines[0][:4]) if lines else 'nothing'!r}"
        )
    return make_table(path, ["image_id", *lines[1]], lines[2:], numbers[2:])


def _celeba(root: Path) -> GroupTable:
    rows = _read_celeba(_find(root, "list_attr_celeba.csv", "list_attr_celeba.txt"), None)
    parts = _read_celeba(
        _find(root, "list_eval_partition.csv", "list_eval_partition.txt"), ["image_id", "partition"]
    )
    names = rows.column("image_id")
    split_of = dict(zip(parts.column("image_id"), parts.labels(SPLITS, "partition").tolist(), strict=True))
    unassigned = [name for name in names if name not in split_of]
    if unassigned:
        raise ConfigError(f"data.root: {parts.path} has no split for {unassigned[0]}")
    folder = root / "img_align_celeba"
    # Some archives contain a nested folder of the same name.
    folder = folder / "img_align_celeba" if (folder / "img_align_celeba").is_dir() else folder
    return GroupTable(
        rows.files("image_id", folder),
        rows.labels({"-1": 0, "0": 0, "1": 1}, "Blond_Hair"),
        rows.labels({"-1": 0, "0": 0, "1": 1}, "Male"),
        torch.tensor([split_of[name] for name in names], dtype=torch.int64),
        ["not blond", "blond"],
        ["female", "male"],
    )


def _isic(root: Path) -> GroupTable:
    rows = read_csv(_find(root, "metadata.csv", "train.csv"))
    files = _image_files([root, root / "images", root / "train"])
    line_of: dict[Path, int] = {}
    for line, name in zip(rows.lines, rows.column("isic_id", "image_name", "image", "name"), strict=True):
        stem = name if Path(name).suffix.lower() not in _EXTENSIONS else Path(name).stem
        path = files.get(stem, root / "images" / f"{stem}.jpg")
        if path in line_of:
            where = f"data.root: {rows.path}, line {line},"
            raise ConfigError(f"{where} names the image of line {line_of[path]} again: {name!r}")
        line_of[path] = line
    return GroupTable(
        list(line_of),
        rows.labels(_DIAGNOSES, "benign_malignant", "target"),
        rows.labels(_BINARY, "patch", "patches", "has_patch"),
        rows.labels(SPLITS, "split") if "split" in rows.columns else None,
        ["benign", "malignant"],
        ["no patch", "patch"],
    )


def _image_files(folders: Iterable[Path]) -> dict[str, Path]:
    """Image files directly in ``folders``, by file name without extension."""
    return {
        path.stem: path
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _EXTENSIONS
    }
