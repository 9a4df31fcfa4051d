"""A folder of images and a table of their labels, any number of them per image."""

from __future__ import annotations

from pathlib import Path

import torch

from pysupcon.data.columns import Roles
from pysupcon.data.config import DEFAULT_TABLE, DataConfig
from pysupcon.data.samples import IMAGENET_MEAN, IMAGENET_STD, FileImages, Samples, Source
from pysupcon.data.tables import SPLITS, check_case, check_images, read_csv
from pysupcon.errors import ConfigError

_SPLIT_COLUMN = "split"


def image_table(config: DataConfig) -> Source:
    """Reads ROOT and the CSV file ``data.table``.

    The first column names the image files, relative to ROOT. An optional column "split" holds train, val or
    test. Each other column is a label: 1 where the image has it, else 0. ``data.columns`` names columns that
    are left out.

    Raises:
        ConfigError: a file is missing, or a line is not of this form; names the file and the line.
    """
    assert config.root is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    table = read_csv(root / (config.table or DEFAULT_TABLE))
    table, notes = Roles.of(config.columns, ()).left_out(table, f"data.root: {table.path}")
    file_column, *others = table.columns or [""]
    names = [name for name in others if name != _SPLIT_COLUMN]
    if len(names) < 2:
        raise ConfigError(
            f"data.root: {table.path} must have a column of file names and two or more columns of labels, "
            f"it has {', '.join(table.columns)}"
        )
    no_labels = [name for name in names if not {*table.column(name)} <= {"0", "1"}]
    if _SPLIT_COLUMN not in others:
        check_case(no_labels, {_SPLIT_COLUMN: _SPLIT_COLUMN}, f"data.root: {table.path}", fixed=True)
    if not table.rows:
        raise ConfigError(f"data.root: {table.path} holds no image")
    paths = table.files(file_column, root)
    check_images(root, paths, config.on_error)
    labels = torch.stack([table.labels({"0": 0, "1": 1}, name) for name in names], dim=1)
    samples = Samples(FileImages(paths), labels, labels)
    parts: dict[int, Samples | None] = {0: samples, 1: None, 2: None}
    if _SPLIT_COLUMN in others:
        split = table.labels(SPLITS, _SPLIT_COLUMN)
        for number in parts:
            rows = (split == number).nonzero().flatten()
            parts[number] = samples.select(rows) if len(rows) else None
    train, val, test = parts.values()
    if train is None:
        raise ConfigError(f"data.root: {table.path} has no train image in its column {_SPLIT_COLUMN}")
    if test is not None and config.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction has no effect: {table.path} has test images in its column {_SPLIT_COLUMN}; "
            "leave it out"
        )
    return Source(
        train, test, names, names, "colour", 3, config.image_size, IMAGENET_MEAN, IMAGENET_STD, val,
        notes=notes,
    )  # fmt: skip
