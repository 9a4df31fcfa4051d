"""A folder of images and a table of their labels, one label of each kind per image."""

from __future__ import annotations

from pathlib import Path

from pysupcon.data.config import TABLE_ROLES, DataConfig
from pysupcon.data.labels import LabelValue, labels_of_roles, number_or_text, split_source, splits_of_role
from pysupcon.data.samples import IMAGENET_MEAN, IMAGENET_STD, FileImages, Source
from pysupcon.data.tables import SPLITS, Table, check_images, read_csv
from pysupcon.errors import ConfigError


def labelled_table(config: DataConfig) -> Source:
    """Reads ROOT and the CSV file ``data.table``: columns file, label, coarse, fine, group and split.

    ``file`` names the image, relative to ROOT, and is required, as is ``label`` or ``fine``. ``label`` is the
    fine label beside ``coarse``, and both without it. ``group`` is a spurious attribute of the class; the
    fine labels are then pairs of class and group, as in :func:`pysupcon.data.arrays.arrays`. ``split`` holds
    train, val or test. ``data.columns`` names columns that are called otherwise, and ``data.coarse_map``
    gives the coarse label of every fine one.

    Raises:
        ConfigError: a file is missing, or a column or line is not of this form; names the file and the line.
    """
    assert config.root is not None
    assert config.table is not None
    assert config.image_size is not None
    root = Path(config.root).expanduser()
    table = read_csv(root / config.table)
    field = f"data.root: {table.path}"
    names = {role: config.columns.get(role, role) for role in TABLE_ROLES}
    _check_columns(config, table, names, field)
    if not table.rows:
        raise ConfigError(f"{field} holds no image")
    paths = [root / file for file in table.files(names["file"])]
    check_images(root, paths, config.on_error)
    values = {
        role: _values(table, name, field)
        for role, name in names.items()
        if role != "file" and name in table.columns
    }
    if "split" in values:
        table.labels(SPLITS, names["split"])  # an error names the line
    if "coarse" in values and "fine" not in values:
        values["fine"] = values.pop("label")
    if config.coarse_map is not None:
        values = _with_coarse_map(config.coarse_map, values, field)
    return split_source(
        FileImages(paths), labels_of_roles(values, field),
        splits_of_role(values, len(paths), field, table.path, config), field, family="colour", channels=3,
        image_size=config.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


def _check_columns(config: DataConfig, table: Table, names: dict[str, str], field: str) -> None:
    repeated = sorted({name for name in table.columns if table.columns.count(name) > 1})
    if repeated:
        raise ConfigError(f"{field} must name each column once, it has {', '.join(table.columns)}")
    missing = [role for role in config.columns if names[role] not in table.columns]
    if missing:
        raise ConfigError(
            f"{field} has no column {names[missing[0]]!r}, which data.columns names as {missing[0]}: it has "
            f"{', '.join(table.columns)}"
        )
    unknown = [name for name in table.columns if name not in names.values()]
    if unknown:
        raise ConfigError(
            f"{field} must have the columns {', '.join(names.values())} and no other, got "
            f"{', '.join(map(repr, unknown))}: remove it, or name its role with --data.columns "
            f"'{{ROLE: {unknown[0]}}}'"
        )
    if names["file"] not in table.columns or not {names["label"], names["fine"]} & set(table.columns):
        raise ConfigError(
            f"{field} must have a column {names['file']}, and {names['label']} or {names['fine']}, it has "
            f"{', '.join(table.columns)}"
        )


def _values(table: Table, name: str, field: str) -> list[LabelValue]:
    texts = table.column(name)
    if "" in texts:
        line = table.first_line + texts.index("")
        raise ConfigError(f"{field}, line {line}, column {name} must not be empty")
    return [number_or_text(text) for text in texts]


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
