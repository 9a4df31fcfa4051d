"""Tables of image files and labels, read with errors that name file, line and column."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pysupcon.errors import ConfigError

SPLIT_NAMES = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
SPLITS = {"0": 0, "1": 1, "2": 2, **SPLIT_NAMES}
"""Values of a column "split": train, validation, test"""


class Table:
    """Rows of a table and their file, for error messages."""

    def __init__(self, path: Path, columns: Sequence[str], rows: list[list[str]], first_line: int) -> None:
        self.path, self.columns, self.rows, self.first_line = path, list(columns), rows, first_line

    def column(self, *names: str) -> list[str]:
        """The column of the first of ``names`` that exists."""
        for name in names:
            if name in self.columns:
                index = self.columns.index(name)
                return [row[index].strip() for row in self.rows]
        raise ConfigError(
            f"data.root: {self.path} must have a column {' or '.join(names)}, "
            f"it has {', '.join(self.columns)}"
        )

    def without(self, names: Sequence[str]) -> Table:
        """The table without the columns ``names``."""
        kept = [index for index, name in enumerate(self.columns) if name not in names]
        rows = [[row[index] for index in kept] for row in self.rows]
        return Table(self.path, [self.columns[index] for index in kept], rows, self.first_line)

    def files(self, name: str) -> list[str]:
        """The values of :meth:`column` as names of files, each of them once."""
        files = self.column(name)
        lines: dict[str, int] = {}
        for line, file in enumerate(files, start=self.first_line):
            where = f"data.root: {self.path}, line {line},"
            if not file:
                raise ConfigError(f"{where} must name a file in its column {name}, which is empty")
            if file in lines:
                raise ConfigError(f"{where} names the file of line {lines[file]} again: {file!r}")
            lines[file] = line
        return files

    def labels(self, values: dict[str, int], *names: str) -> Tensor:
        """The values of :meth:`column` as labels, [N] int64."""
        found = []
        for number, text in enumerate(self.column(*names)):
            if text.lower() not in values:
                raise ConfigError(
                    f"data.root: {self.path}, line {self.first_line + number}, column "
                    f"{next(name for name in names if name in self.columns)} must be one of "
                    f"{', '.join(values)}, got {text!r}"
                )
            found.append(values[text.lower()])
        return torch.tensor(found, dtype=torch.int64)


def read_csv(path: Path) -> Table:
    """Read a CSV file whose first line names the columns.

    Raises:
        ConfigError: the file cannot be read, or a line has another number of fields than the first.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"data.root: {path} is empty")
    return make_table(path, [name.strip() for name in lines[0]], lines[1:], 2)


def make_table(path: Path, columns: list[str], rows: list[list[str]], first_line: int) -> Table:
    """A table of ``rows`` that start at line ``first_line``; every row has a field for each column."""
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ConfigError(
                f"data.root: {path}, line {first_line + number}, must have {len(columns)} fields, "
                f"got {len(row)}"
            )
    return Table(path, columns, rows, first_line)


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
