"""The columns or arrays of a user's file by their role, and those that are left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pysupcon.data.tables import Table, check_case
from pysupcon.errors import ConfigError

IGNORE = "ignore"
"""Key of ``data.columns`` whose value names the columns that are left out"""
ColumnNames = dict[str, str | list[str]]
_YAML_WORDS = ("y", "yes", "n", "no", "true", "false", "on", "off", "null")
_INDEX_NAMES = ("", "Unnamed: 0")
"""Names that pandas gives to the column of the index when it writes, and reads again, a CSV file"""


@dataclass(frozen=True)
class Roles:
    """The field ``data.columns`` for one kind of file.

    Attributes:
        given: the columns by role that the user named.
        ignored: the columns that are left out.
        names: the column of every role; a role whose column is left out is missing.
    """

    given: dict[str, str]
    ignored: list[str]
    names: dict[str, str]

    @classmethod
    def of(cls, columns: Mapping[str, str | list[str]], roles: Iterable[str]) -> Roles:
        """The columns of ``roles``, checked by :func:`check_columns`; the default names are the roles."""
        given = {role: str(name) for role, name in columns.items() if role != IGNORE}
        ignored = as_list(columns.get(IGNORE, []))
        names = {role: given.get(role, role) for role in roles}
        return cls(given, ignored, {role: name for role, name in names.items() if name not in ignored})

    def check_ignored(self, available: Sequence[str], field: str) -> None:
        """Refuse names that the file does not have, and columns whose case differs from that of a role."""
        unknown = [name for name in self.ignored if name not in available]
        if unknown:
            raise ConfigError(
                f"{field} has no {', '.join(map(repr, unknown))}, which data.columns names as {IGNORE}: it "
                f"has {', '.join(available)}"
            )
        others = [name for name in available if name not in (*self.ignored, *self.given.values())]
        wanted = {
            role: name
            for role, name in self.names.items()
            if role not in (*self.given, "features") and name not in available
        }
        check_case(others, wanted, field)

    def left_out(self, table: Table, field: str) -> tuple[Table, list[str]]:
        """The table without the columns that are left out, and lines for the user.

        The index of a pandas DataFrame is one of them: a first column without a name that numbers the rows.
        """
        self.check_ignored(table.columns, field)
        first = next(iter(table.columns), "")
        notes = []
        index = first in _INDEX_NAMES and first not in self.given.values() and first not in self.ignored
        if index and table.columns and _numbers_rows([row[0].strip() for row in table.rows]):
            shown = f"named {first!r}" if first else "without a name"
            notes.append(
                f"{field}: the first column, {shown}, numbers the rows, like the index of a pandas "
                "DataFrame: it is left out"
            )
            table = table.without([first])
        return table.without(self.ignored), notes


def _numbers_rows(texts: Sequence[str]) -> bool:
    """Whether the texts are whole numbers, once each: an index, also of a frame whose rows were shuffled."""
    return all(re.fullmatch(r"[0-9]+", text) for text in texts) and len(set(texts)) == len(texts)


def as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def check_columns(columns: Mapping[str, str | list[str]], roles: Sequence[str]) -> None:
    """Check the field ``data.columns``.

    Raises:
        ConfigError: a key is not a role, a role has several columns, or a column has a role and is left out.
    """
    ignored = as_list(columns.get(IGNORE, []))
    for role, name in columns.items():
        if role == IGNORE:
            continue
        if role not in roles:
            raise ConfigError(f"data.columns must have the keys {', '.join((*roles, IGNORE))}, got {role!r}")
        if not isinstance(name, str):
            raise ConfigError(f"data.columns must name one column as {role}, got {name!r}")
        if name in ignored:
            raise ConfigError(f"data.columns must name {name!r} as {role} or as {IGNORE}, not as both")


def ignore_flag(columns: Mapping[str, str | list[str]], more: Sequence[str]) -> str:
    """The value of ``data.columns`` that also leaves out the columns ``more``, in YAML."""
    ignored = ", ".join(map(_quoted, [*as_list(columns.get(IGNORE, [])), *more]))
    given = [f"{role}: {_quoted(str(name))}" for role, name in columns.items() if role != IGNORE]
    return "{" + ", ".join([*given, f"{IGNORE}: [{ignored}]"]) + "}"


def _quoted(name: str) -> str:
    """A string in YAML's flow style."""
    plain = re.fullmatch(r"[A-Za-z_][\w .-]*", name) and name.lower() not in _YAML_WORDS
    return name if plain else json.dumps(name, ensure_ascii=False)
