"""Feature vectors and labels in files: .npz, .npy, .safetensors, .csv and .parquet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysupcon.data.columns import Roles, ignore_flag
from pysupcon.data.config import ROLES, DataConfig
from pysupcon.data.labels import (
    LabelValue,
    columns_of_levels,
    labels_of_column,
    labels_of_roles,
    plain_label,
    split_source,
    splits_of_role,
)
from pysupcon.data.samples import Source
from pysupcon.data.tables import Table, read_csv
from pysupcon.data.vectors import as_vectors
from pysupcon.errors import ConfigError
from pysupcon.reading import check_regular, one_line


class Found(NamedTuple):
    """What a file holds."""

    columns: dict[str, Any]
    """Features [N, D] and lists of labels, by role"""
    feature_names: list[str] = []  # noqa: RUF012  # never changed
    notes: list[str] = []  # noqa: RUF012


def arrays(config: DataConfig) -> Source:
    """Read the file ``data.root``.

    ``data.columns`` names the array or column of each role: features, label, coarse, fine, group, split.
    Without it they bear the names of the roles; in a table the features are all other columns, except those
    that ``data.columns`` names as ignore. A file .npy holds the features, and files beside it, named by role,
    hold the others (label.npy).

    Labels are numbers or text. ``group`` is a spurious attribute of the class: the fine labels are then pairs
    of class and group, as in Waterbirds. ``split`` holds train, val or test, or 0, 1, 2.

    Raises:
        ConfigError: the file cannot be read or lacks a role; the message names the file.
    """
    assert config.root is not None
    path = Path(config.root).expanduser()
    readers: dict[str, Callable[[Path, Roles, str], Found]] = {
        ".npz": _npz, ".npy": _npy, ".safetensors": _safetensors, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise ConfigError(
            f"data.root must be a file {', '.join(readers)} for data.dataset=arrays, got {path}"
        )
    field = f"data.root: {path}"
    roles = Roles.of(config.columns, ROLES)
    try:
        check_regular(path)
        columns, feature_names, notes = readers[path.suffix](path, roles, field)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # the readers of the formats have no common error
        raise ConfigError(f"{field} cannot be read: {one_line(error)}") from error
    missing = [role for role in roles.given if role not in columns]
    if missing:
        raise ConfigError(
            f"{field} has no {roles.given[missing[0]]!r}, which data.columns names as {missing[0]}"
        )
    if "features" not in columns:
        raise ConfigError(f"{field} has no features: name them with --data.columns '{{features: NAME}}'")
    features = as_vectors(columns.pop("features"), field)
    values = {role: _labels_of(column, len(features), field, role) for role, column in columns.items()}
    source = split_source(
        features, labels_of_roles(values, field), splits_of_role(values, len(features), field, path, config),
        field, family="vectors", channels=features.shape[1], image_size=0, mean=(), std=(),
    )  # fmt: skip
    label_columns = columns_of_levels({role: roles.names[role] for role in values})
    return replace(source, notes=notes, feature_names=feature_names, label_columns=label_columns)


def _labels_of(column: Any, count: int, field: str, role: str) -> list[LabelValue]:
    values = column.tolist() if isinstance(column, (np.ndarray, Tensor)) else list(column)
    if len(values) != count:
        raise ConfigError(f"{field} has {count} rows of features, but {len(values)} of {role}")
    return [plain_label(value, f"{field}: {role} of row {row}") for row, value in enumerate(values)]


def _npz(path: Path, roles: Roles, field: str) -> Found:
    with np.load(path, allow_pickle=False) as stored:
        roles.check_ignored(list(stored), field)
        found = {role: name for role, name in roles.names.items() if name in stored}
        return Found({role: _array(stored, name, field) for role, name in found.items()})


def _array(stored: Any, name: str, field: str) -> Any:
    try:
        return stored[name]
    except ValueError as error:
        raise _object_error(error, field, f"the array {name}") or error from error


def _object_error(error: ValueError, field: str, what: str) -> ConfigError | None:
    """The error for an array of Python objects, which NumPy stores as a pickle; None for another error."""
    if "Object arrays" not in str(error):
        return None
    return ConfigError(
        f"{field}: {what} must hold numbers or text, it holds Python objects (dtype object), which may run "
        "code: save text with .astype(str), numbers with .astype(float)"
    )


def _npy(path: Path, roles: Roles, field: str) -> Found:
    beside = {role: path.with_name(f"{name}.npy") for role, name in roles.names.items()}
    roles.check_ignored([file.stem for file in path.parent.glob("*.npy") if file != path], field)
    files = {"features": path} | {role: beside[role] for role in ROLES[1:] if role in beside}
    found = {}
    for role, file in files.items():
        if role == "features" or file.is_file():
            try:
                found[role] = np.load(file, allow_pickle=False)
            except ValueError as error:
                raise _object_error(error, field, f"the array in {file.name}") or error from error
    return Found(found)


def _safetensors(path: Path, roles: Roles, field: str) -> Found:
    from safetensors.torch import load_file

    stored = load_file(path)
    roles.check_ignored(list(stored), field)
    return Found({role: stored[name] for role, name in roles.names.items() if name in stored})


def _csv(path: Path, roles: Roles, field: str) -> Found:
    table, notes = roles.left_out(read_csv(path), field)
    taken = {role: name for role, name in roles.names.items() if role != "features" and name in table.columns}
    found: dict[str, Any] = {role: labels_of_column(table, name) for role, name in taken.items()}
    names = _feature_columns(table.columns, set(taken.values()), roles)
    columns = [_numbers(table, name, names, roles) for name in names]
    found["features"] = torch.tensor([[*row] for row in zip(*columns, strict=True)])
    return Found(found, names, notes)


def _feature_columns(all_columns: list[str], taken: set[str], roles: Roles) -> list[str]:
    """The columns whose names start with ``data.columns.features``, or all that have no role."""
    start = roles.given.get("features")
    names = [n for n in all_columns if n not in taken and (start is None or n.startswith(start))]
    if not names:
        raise ConfigError(
            "data.columns leaves no column of features" + (f" that starts with {start}" if start else "")
        )
    return names


def _numbers(table: Table, name: str, names: list[str], roles: Roles) -> list[float]:
    texts = table.column(name)
    for row, text in enumerate(texts):
        if not _is_number(text):
            at_row = [other for other in names if not _is_number(table.column(other)[row])]
            raise _text_error(
                f"data.root: {table.path}, line {table.lines[row]}, column {name}", text, at_row, roles
            )
    return [float(text) for text in texts]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text_error(place: str, got: object, columns: list[str], roles: Roles) -> ConfigError:
    return ConfigError(
        f"{place} must be a number, got {got!r}. Columns that are no features need a role, or are left out "
        f"with --data.columns '{ignore_flag({**roles.given, 'ignore': roles.ignored}, columns)}'"
    )


def _parquet(path: Path, roles: Roles, field: str) -> Found:
    from pyarrow import parquet

    table = parquet.read_table(path)
    roles.check_ignored([str(name) for name in table.column_names], field)
    index = [name for name in table.column_names if name.startswith("__index_level_")]
    index = [name for name in index if name not in (*roles.ignored, *roles.given.values())]
    notes = [f"{field}: {name}, the index of a pandas DataFrame, is left out" for name in index]
    table = table.drop_columns([*index, *roles.ignored])
    names = [str(name) for name in table.column_names]
    taken = {role: name for role, name in roles.names.items() if role != "features" and name in names}
    found: dict[str, Any] = {role: table.column(name).to_pylist() for role, name in taken.items()}
    whole = roles.names.get("features")
    if whole in names:  # a column of lists
        found["features"] = [np.asarray(row, dtype=np.float64) for row in table.column(whole).to_pylist()]
        return Found(found, [], notes)
    chosen = _feature_columns(names, set(taken.values()), roles)
    columns = {name: table.column(name).to_numpy() for name in chosen}
    others = [name for name, column in columns.items() if column.dtype.kind not in "biuf"]
    if others:  # text, and dates, which would become nanoseconds
        raise _text_error(f"{field}, column {others[0]}", columns[others[0]][0], others, roles)
    found["features"] = np.stack(list(columns.values()), axis=1).astype(np.float64)
    return Found(found, chosen, notes)
