"""Formats results as aligned text for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.machine import name as machine_name

_COLUMNS = ("N", "D", "classes", "dtype", "tau", "loss", "threads")
_KEYS = ("n", "dim", "classes", "dtype", "temperature", "loss", "threads")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return (
            f"{value * 1e3:.{3 - len(str(int(value * 1e3)))}f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
        )
    return f"{value:.2f} s"


def memory(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            number = value / size
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{value:.0f} B"


def align(lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the header."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]])


def between_markers(page: str, begin: str, end: str, section: str) -> str:
    """``page`` with the text between two markers replaced by ``section``.

    Raises:
        ValueError: ``page`` does not have each marker exactly once, in order.
    """
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must contain {begin} and then {end}, once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def _note(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if "skipped" in row:
        return str(row["skipped"])
    parts = []
    if "rate_ratio" in row:
        parts.append(
            f"{row['rate_flops'] / 1e9:.0f} GFLOP/s at 4u, torch.mm {row['mm_flops'] / 1e9:.0f}"
            f" (2048^3: {row['square_mm_flops'] / 1e9:.0f}): {row['rate_ratio']:.2f} x"
        )
    if "bytes_a_row" in row:
        parts.append(
            f"{row['bytes_a_row']:.0f} B per row without the gradient, {memory(row['fixed_bytes'])} fixed"
        )
    return "; ".join(parts)


def results(rows: Iterable[Mapping[str, Any]]) -> str:
    """One table for each case."""
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return "\n\n".join(f"[{name}]\n{_case(found)}" for name, found in cases.items())


def _case(rows: Sequence[Mapping[str, Any]]) -> str:
    own = {_point(row): row.get("both_s") for row in rows if row["implementation"] == "pysupcon"}
    head = [*_COLUMNS, "implementation", "forward", "backward", "both", "relative to pysupcon", "peak memory"]
    lines = [[*head, "loss error", "grad error", ""]]
    for row in rows:
        ours, both = own.get(_point(row)), row.get("both_s")
        ratio = f"{both / ours:.2f} x" if ours and both else ""
        lines.append(
            [
                *(f"{row[key]}" for key in _KEYS),
                row["implementation"],
                seconds(row.get("forward_s")),
                seconds(row.get("backward_s")),
                seconds(both),
                ratio,
                memory(row.get("peak_bytes")),
                _error(row.get("loss_error")),
                _error(row.get("gradient_error")),
                _note(row),
            ]
        )
    return align(lines)


def _point(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in _KEYS)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def heading(machine: Mapping[str, Any]) -> str:
    """The machine, versions and commit in one line."""
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"{machine_name(dict(machine))}; {versions}; commit {machine['commit']}; load {machine['load']}"
