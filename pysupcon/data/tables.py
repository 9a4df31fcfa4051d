"""Tables of image files and labels, read with errors that name file, line and column."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pysupcon.errors import ConfigError

SPLIT_NAMES = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
SPLITS = {"0": 0, "1": 1, "2": 2, **SPLIT_NAMES}
"""Values of a column "split": train, validation, test"""
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", " ": "spaces"}


class Table:
    """Rows of a table, with their file and the lines where they start, for error messages."""

    def __init__(
        self, path: Path, columns: Sequence[str], rows: list[list[str]], lines: Sequence[int]
    ) -> None:
        self.path, self.columns, self.rows, self.lines = path, list(columns), rows, lines

    def column(self, *names: str) -> list[str]:
        """The column of the first of ``names`` that exists."""
        for name in names:
            if name in self.columns:
                index = self.columns.index(name)
                return [row[index].strip() for row in self.rows]
        check_case(self.columns, {name: name for name in names}, f"data.root: {self.path}", fixed=True)
        raise ConfigError(
            f"data.root: {self.path} must have a column {' or '.join(names)}, "
            f"it has {', '.join(self.columns)}"
        )

    def without(self, names: Sequence[str]) -> Table:
        """The table without the columns ``names``."""
        kept = [index for index, name in enumerate(self.columns) if name not in names]
        rows = [[row[index] for index in kept] for row in self.rows]
        return Table(self.path, [self.columns[index] for index in kept], rows, self.lines)

    def files(self, name: str, root: Path) -> list[Path]:
        """The values of :meth:`column` as files in ``root``, each of them once, however it is written."""
        files: list[Path] = []
        line_of: dict[str, int] = {}
        top = os.path.abspath(root)  # the paths are compared without . and .., links are not followed
        for line, file in zip(self.lines, self.column(name), strict=True):
            where = f"data.root: {self.path}, line {line},"
            if not file:
                raise ConfigError(f"{where} must name a file in its column {name}, which is empty")
            path = os.path.relpath(file, top) if os.path.isabs(file) else os.path.normpath(file)
            if path == ".." or path.startswith(f"..{os.sep}"):
                raise ConfigError(f"{where} must name a file in data.root {str(root)!r}, got {file!r}")
            if path in line_of:
                raise ConfigError(f"{where} names the file of line {line_of[path]} again: {file!r}")
            line_of[path] = line
            files.append(root / path)
        return files

    def labels(self, values: dict[str, int], *names: str) -> Tensor:
        """The values of :meth:`column` as labels, [N] int64."""
        found = []
        for line, text in zip(self.lines, self.column(*names), strict=True):
            if text.lower() not in values:
                raise ConfigError(
                    f"data.root: {self.path}, line {line}, column "
                    f"{next(name for name in names if name in self.columns)} must be one of "
                    f"{', '.join(values)}, got {text!r}"
                )
            found.append(values[text.lower()])
        return torch.tensor(found, dtype=torch.int64)


def read_csv(path: Path) -> Table:
    """Read a CSV file whose first line names the columns. Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, its separator is not a comma, or it is not as
            :func:`make_table` requires.
    """
    rows, lines, start = [], [], 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(field.strip() for field in row):
                    rows.append(row)
                    lines.append(start)
                start = reader.line_num + 1  # a quoted field may hold line breaks
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"data.root: {path} is empty")
    columns = [name.strip() for name in rows[0]]
    found = [name for separator, name in _OTHER_SEPARATORS.items() if separator in columns[0]]
    if len(columns) == 1 and found:
        raise ConfigError(
            f"data.root: {path} must separate its columns by commas, its first line has {found[0]}: "
            f"{columns[0]!r:.80}"
        )
    return make_table(path, columns, rows[1:], lines[1:])


def make_table(path: Path, columns: list[str], rows: list[list[str]], lines: Sequence[int]) -> Table:
    """A table of ``rows`` that start at ``lines``.

    Raises:
        ConfigError: two columns have the same name, or a row has not one field for each column.
    """
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"data.root: {path} must name each column once, it has {', '.join(map(repr, repeated))} more "
            "than once"
        )
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(columns):
            raise ConfigError(
                f"data.root: {path}, line {line}, must have {len(columns)} fields, got {len(row)}"
            )
    return Table(path, columns, rows, lines)


def check_case(
    available: Sequence[str], names: Mapping[str, str], field: str, *, fixed: bool = False
) -> None:
    """Refuse a column whose name differs from one that is looked for in upper and lower case only.

    Args:
        available: names of the columns.
        names: the name that is looked for, by role.
        field: the file, for the message.
        fixed: whether data.columns cannot give another name.
    """
    for role, name in names.items():
        similar = [other for other in available if other.lower() == name.lower()]
        if similar and name not in available:
            remedy = "" if fixed else f", or use --data.columns '{{{role}: {similar[0]}}}'"
            raise ConfigError(
                f"{field} has a column {similar[0]!r}: did you mean {name}? Upper and lower case count. "
                f"Rename it{remedy}"
            )


def check_images(root: str | Path, paths: Sequence[Path], on_error: Literal["stop", "skip"] = "stop") -> None:
    """Check that the images of a table exist, unless files that cannot be read are left out later.

    Raises:
        ConfigError: some are missing; names the first.
    """
    missing = [path for path in paths if not path.is_file()] if on_error == "stop" else []
    if missing:
        raise ConfigError(
            f"data.root {str(root)!r} lacks {len(missing)} of the {len(paths)} images that its table "
            f"names, first {missing[0]}"
        )
