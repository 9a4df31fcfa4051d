"""A folder of images and a table of their labels, one label of each kind per image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pysupcon.data.columns import Roles, ignore_flag
from pysupcon.data.config import TABLE_ROLES, DataConfig
from pysupcon.data.labels import (
    LabelValue,
    columns_of_levels,
    labels_of_column,
    labels_of_roles,
    split_source,
    splits_of_role,
)
from pysupcon.data.samples import IMAGENET_MEAN, IMAGENET_STD, FileImages, Source
from pysupcon.data.tables import SPLITS, Table, check_images, read_csv
from pysupcon.errors import ConfigError


def labelled_table(config: DataConfig) -> Source:
    """Reads ROOT and the CSV file ``data.table``: columns file, label, coarse, fine, group and split.

    ``file`` names the image, relative to ROOT, and is required, as is ``label`` or ``fine``. ``label`` is the
    fine label beside ``coarse``, and both without it. ``group`` is a spurious attribute of the class; the
    fine labels are then pairs of class and group, as in :func:`pysupcon.data.arrays.arrays`. ``split`` holds
    train, val or test. ``data.columns`` names columns that are called otherwise, or that are left out, and
    ``data.coarse_map`` gives the coarse label of every fine one.

    Raises:
        ConfigError: a file is missing, or a column or line is not of this form; names the file and the line.
    """
    assert config.root is not None
    assert config.table is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    table = read_csv(root / config.table)
    field = f"data.root: {table.path}"
    roles = Roles.of(config.columns, TABLE_ROLES)
    names = roles.names
    table, notes = roles.left_out(table, field)
    _check_columns(config, table, roles, field)
    if not table.rows:
        raise ConfigError(f"{field} holds no image")
    paths = table.files(names["file"], root)
    check_images(root, paths, config.on_error)
    values = {
        role: labels_of_column(table, name)
        for role, name in names.items()
        if role != "file" and name in table.columns
    }
    if "split" in values:
        table.labels(SPLITS, names["split"])  # an error names the line
    label_columns = columns_of_levels({role: names[role] for role in values})
    if "coarse" in values and "fine" not in values:
        values["fine"] = values.pop("label")
    if config.coarse_map is not None:
        values = _with_coarse_map(config.coarse_map, values, field)
        label_columns = {"fine": label_columns["fine"]}
    source = split_source(
        FileImages(paths), labels_of_roles(values, field),
        splits_of_role(values, len(paths), field, table.path, config), field, family="colour", channels=3,
        image_size=config.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    return replace(source, notes=notes, label_columns=label_columns)


def _check_columns(config: DataConfig, table: Table, roles: Roles, field: str) -> None:
    names, has = roles.names, f"it has {', '.join(table.columns)}"
    missing = [role for role in roles.given if names[role] not in table.columns]
    if missing:
        raise ConfigError(
            f"{field} has no column {names[missing[0]]!r}, which data.columns names as {missing[0]}: {has}"
        )
    labels = [names[role] for role in ("label", "fine") if role in names]
    needed = f"must have a column {names.get('file', 'file')}, and {' or '.join(labels or ['label'])}"
    if names.get("file") not in table.columns or not {*labels} & {*table.columns}:
        raise ConfigError(f"{field} {needed}, {has}; name the columns with --data.columns '{{ROLE: NAME}}'")
    unknown = [name for name in table.columns if name not in names.values()]
    if unknown:
        optional = [names[role] for role in ("coarse", "group", "split") if role in names]
        raise ConfigError(
            f"{field} {needed}; {', '.join(optional)} are optional, and a column without a role is "
            f"refused, got {', '.join(map(repr, unknown))}: name its role, {{ROLE: {unknown[0]}}}, or leave "
            f"it out, --data.columns '{ignore_flag(config.columns, unknown)}'"
        )


def _with_coarse_map(
    coarse_map: dict[str, str], values: dict[str, list[LabelValue]], field: str
) -> dict[str, list[LabelValue]]:
    """Replace the label by a fine label and the coarse label that the map gives it."""
    if "coarse" in values or "group" in values:
        raise ConfigError(
            f"data.coarse_map has no effect: {field} has a column of coarse labels or groups; leave it out"
        )
    fine = values.get("fine", values.get("label", []))
    names = {str(value) for value in fine}
    if names != set(coarse_map):
        missing, unknown = sorted(names - set(coarse_map)), sorted(set(coarse_map) - names)
        raise ConfigError(
            f"data.coarse_map must map every class of {field} and no other: missing {missing}, unknown "
            f"{unknown}"
        )
    others = {role: column for role, column in values.items() if role != "label"}
    return {**others, "fine": fine, "coarse": [coarse_map[str(value)] for value in fine]}
