"""Compares new results with old ones and reports regressions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks import table

TOLERANCE = 1.25
OURS = ("pysupcon", "tiled")
_SAME = ("case", "implementation", "loss", "n", "dim", "classes", "dtype", "temperature", "device", "threads")
_MEASURES = {"both_s": table.seconds, "peak_bytes": table.memory}


class Comparison(NamedTuple):
    text: str
    slower: bool
    """pysupcon is slower or uses more memory than the tolerance allows"""


def regressions(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float = TOLERANCE) -> Comparison:
    """Ratios new / old of every point that both results have.

    Only pysupcon's own implementations can regress. If the others are slower too, the machine was busy.
    """
    before = {_key(row): row for row in old["rows"]}
    lines = [["case", "implementation", "loss", "N", "D", "measure", "old", "new", "ratio", ""]]
    slower = False
    for row in new["rows"]:
        earlier = before.get(_key(row), {})
        for measure, text in _MEASURES.items():
            if measure not in row or not earlier.get(measure):
                continue
            ratio = row[measure] / earlier[measure]
            regressed = ratio > tolerance and row["implementation"] in OURS
            slower |= regressed
            lines.append(
                [
                    row["case"],
                    row["implementation"],
                    row["loss"],
                    str(row["n"]),
                    str(row["dim"]),
                    "time" if measure == "both_s" else "memory",
                    text(earlier[measure]),
                    text(row[measure]),
                    f"{ratio:.2f}",
                    "REGRESSED" if regressed else "",
                ]
            )
    if len(lines) == 1:
        return Comparison("nothing to compare: the results have no point in common", False)
    note = ""
    if old["machine"]["processor"] != new["machine"]["processor"]:
        note = f"\nnote: the old results were measured on another machine ({old['machine']['processor']})"
    return Comparison(table.align(lines) + note, slower)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SAME)
