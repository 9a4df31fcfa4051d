"""Draw the memory allocated by torch over time from a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

_CPU = 0
_MEMORY_EVENT = "[memory]"
_MARKED = ("pysupcon::loss", "pysupcon::gather", "encoder", "optimizer")
"""Ranges that are shown in the picture."""
_BACKWARD = "_RowStatisticsFunctionBackward"


class Allocated(NamedTuple):
    """Allocated memory of one device over time."""

    seconds: list[float]
    """Time since the first event."""
    bytes: list[int]
    """Bytes allocated by torch; on the CPU since the start of the record."""
    spans: list[tuple[str, float, float]]
    """Named ranges: name, start, end."""


def read_allocated(trace: Path, device_type: str) -> Allocated:
    """Read a Chrome trace of torch.profiler with ``profile_memory``."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [event for event in events if event.get("name") == _MEMORY_EVENT and _of(event, device_type)]
    found.sort(key=lambda event: event["ts"])
    if not found:
        return Allocated([], [], [])
    start = found[0]["ts"]
    seconds = [(event["ts"] - start) / 1e6 for event in found]
    if device_type == "cpu":
        # The CPU allocator does not record totals: sum the allocations and frees.
        total, totals = 0, []
        for event in found:
            total += int(event["args"]["Bytes"])
            totals.append(total)
    else:
        totals = [int(event["args"]["Total Allocated"]) for event in found]
    return Allocated(seconds, totals, _spans(events, start))


def _of(event: dict[str, Any], device_type: str) -> bool:
    return (event["args"]["Device Type"] == _CPU) == (device_type == "cpu")


def _spans(events: list[dict[str, Any]], start: float) -> list[tuple[str, float, float]]:
    found = []
    for event in events:
        name = str(event.get("name", ""))
        host = event.get("cat") in ("user_annotation", "cpu_op")
        if host and (name in _MARKED or name.endswith(_BACKWARD)) and "autograd::engine" not in name:
            label = "pysupcon backward" if name.endswith(_BACKWARD) else name
            first = (event["ts"] - start) / 1e6
            found.append((label, first, first + event["dur"] / 1e6))
    return sorted(found, key=lambda span: span[1])


def draw_memory(trace: Path, picture: Path, device_type: str, title: str = "") -> bool:
    """Draw the memory over time as a PNG file.

    Returns:
        False if the trace holds no allocation; then no file is written.
    """
    from matplotlib.figure import Figure

    found = read_allocated(trace, device_type)
    if not found.seconds:
        return False
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="MiB allocated by torch")
    values = [value / 2**20 for value in found.bytes]
    axes.fill_between(found.seconds, values, step="post", color="#3f90da", alpha=0.35)
    axes.step(found.seconds, values, where="post", color="#3f90da", linewidth=1)
    colours = dict(zip((*_MARKED, "pysupcon backward"), _COLOURS, strict=True))
    for name, first, last in found.spans:
        axes.axvspan(first, last, color=colours[name], alpha=0.15, label=name)
    if found.spans:
        unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=8)
    peak = max(range(len(values)), key=values.__getitem__)
    axes.annotate(f"peak {values[peak]:.4g} MiB", (found.seconds[peak], values[peak]), fontsize=8)
    axes.set_title(title or f"memory over time, {device_type}", fontsize=10)
    axes.set_ylim(bottom=min(0.0, min(values)))
    figure.savefig(picture)
    return True


_COLOURS = ("#bd1f01", "#832db6", "#94a4a2", "#a96b59", "#ffa90e")
"""Colours for all kinds of colour vision (Petroff 2021, arXiv 2107.02270)."""
