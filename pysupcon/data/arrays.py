"""Feature vectors and labels in files: .npz, .npy, .safetensors, .csv and .parquet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysupcon.data.config import ROLES, DataConfig
from pysupcon.data.labels import (
    LabelValue,
    labels_of_roles,
    number_or_text,
    plain_label,
    split_source,
    splits_of_role,
)
from pysupcon.data.samples import Source
from pysupcon.data.tables import Table, read_csv
from pysupcon.data.vectors import as_vectors
from pysupcon.errors import ConfigError
from pysupcon.reading import check_regular, one_line

Columns = dict[str, Any]
"""Features [N, D] and lists of labels, by role"""


def arrays(config: DataConfig) -> Source:
    """Read the file ``data.root``.

    ``data.columns`` names the array or column of each role: features, label, coarse, fine, group, split.
    Without it they bear the names of the roles; in a table the features are all other columns. A file .npy
    holds the features, and files beside it, named by role, hold the others (label.npy).

    Labels are numbers or text. ``group`` is a spurious attribute of the class: the fine labels are then pairs
    of class and group, as in Waterbirds. ``split`` holds train, val or test, or 0, 1, 2.

    Raises:
        ConfigError: the file cannot be read or lacks a role; the message names the file.
    """
    assert config.root is not None
    path = Path(config.root).expanduser()
    readers: dict[str, Callable[[Path, dict[str, str]], Columns]] = {
        ".npz": _npz, ".npy": _npy, ".safetensors": _safetensors, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise ConfigError(
            f"data.root must be a file {', '.join(readers)} for data.dataset=arrays, got {path}"
        )
    field = f"data.root: {path}"
    try:
        check_regular(path)
        found = readers[path.suffix](path, config.columns)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # the readers of the formats have no common error
        raise ConfigError(f"{field} cannot be read: {one_line(error)}") from error
    missing = [role for role in config.columns if role not in found]
    if missing:
        raise ConfigError(
            f"{field} has no {config.columns[missing[0]]!r}, which data.columns names as {missing[0]}"
        )
    if "features" not in found:
        raise ConfigError(f"{field} has no features: name them with --data.columns '{{features: NAME}}'")
    features = as_vectors(found.pop("features"), field)
    values = {role: _labels_of(column, len(features), field, role) for role, column in found.items()}
    return split_source(
        features, labels_of_roles(values, field), splits_of_role(values, len(features), field, path, config),
        field, family="vectors", channels=features.shape[1], image_size=0, mean=(), std=(),
    )  # fmt: skip


def _labels_of(column: Any, count: int, field: str, role: str) -> list[LabelValue]:
    values = column.tolist() if isinstance(column, (np.ndarray, Tensor)) else list(column)
    if len(values) != count:
        raise ConfigError(f"{field} has {count} rows of features, but {len(values)} of {role}")
    return [plain_label(value, f"{field}: {role} of row {row}") for row, value in enumerate(values)]


def _by_role(stored: Any, columns: dict[str, str]) -> Columns:
    """The arrays of a mapping by role."""
    return {role: stored[columns.get(role, role)] for role in ROLES if columns.get(role, role) in stored}


def _npz(path: Path, columns: dict[str, str]) -> Columns:
    with np.load(path, allow_pickle=False) as stored:
        return _by_role(stored, columns)


def _npy(path: Path, columns: dict[str, str]) -> Columns:
    found: Columns = {"features": np.load(path, allow_pickle=False)}
    for role in ROLES[1:]:
        beside = path.with_name(f"{columns.get(role, role)}.npy")
        if beside.is_file():
            found[role] = np.load(beside, allow_pickle=False)
    return found


def _safetensors(path: Path, columns: dict[str, str]) -> Columns:
    from safetensors.torch import load_file

    return _by_role(load_file(path), columns)


def _csv(path: Path, columns: dict[str, str]) -> Columns:
    table = read_csv(path)
    found: Columns = {
        role: [number_or_text(text) for text in table.column(columns.get(role, role))]
        for role in ROLES[1:]
        if columns.get(role, role) in table.columns
    }
    taken = {columns.get(role, role) for role in found}
    names = _feature_columns(table.columns, taken, columns)
    found["features"] = torch.tensor(
        [[*row] for row in zip(*(_numbers(table, n) for n in names), strict=True)]
    )
    return found


def _feature_columns(all_columns: list[str], taken: set[str], columns: dict[str, str]) -> list[str]:
    """The columns whose names start with ``columns["features"]``, or all that have no role."""
    start = columns.get("features")
    names = [n for n in all_columns if n not in taken and (start is None or n.startswith(start))]
    if not names:
        raise ConfigError(
            "data.columns leaves no column of features" + (f" that starts with {start}" if start else "")
        )
    return names


def _numbers(table: Table, name: str) -> list[float]:
    numbers = []
    for row, text in enumerate(table.column(name)):
        try:
            numbers.append(float(text))
        except ValueError as error:
            raise ConfigError(
                f"data.root: {table.path}, line {table.first_line + row}, column {name} must be a number, "
                f"got {text!r}; columns that are no features need a role (data.columns)"
            ) from error
    return numbers


def _parquet(path: Path, columns: dict[str, str]) -> Columns:
    from pyarrow import parquet

    table = parquet.read_table(path)
    names = [str(name) for name in table.column_names]
    found: Columns = {
        role: table.column(columns.get(role, role)).to_pylist()
        for role in ROLES[1:]
        if columns.get(role, role) in names
    }
    whole = columns.get("features", "features")
    if whole in names:  # a column of lists
        found["features"] = [np.asarray(row, dtype=np.float64) for row in table.column(whole).to_pylist()]
        return found
    chosen = _feature_columns(names, {columns.get(role, role) for role in found}, columns)
    found["features"] = np.stack([table.column(name).to_numpy() for name in chosen], axis=1).astype(
        np.float64
    )
    return found
