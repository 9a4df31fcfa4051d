"""Plots time and memory against N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.kernels.peers import PEERS
from benchmarks.machine import name as machine_name

_PICTURES = {
    "both_s": ("time", ("speed", "small"), "seconds, forward + backward"),
    "peak_bytes": ("memory", ("memory", "memory65k"), "GiB above the inputs, at the peak"),
}
# Colours for readers with any kind of colour vision (Petroff 2021, arXiv 2107.02270).
_COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300")
_MARKERS = "os^Dv*P"


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw time.png and memory.png of the SupCon results. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for measure, (name, cases, label) in _PICTURES.items():
        rows = [row for row in results["rows"] if row["case"] in cases and row["loss"] == "supcon"]
        if any(measure in row for row in rows):
            drawn.append(folder / f"{name}.png")
            _draw(rows, measure, label, results["machine"]).savefig(drawn[-1])
    return drawn


def _draw(rows: Sequence[Mapping[str, Any]], measure: str, label: str, machine: Mapping[str, Any]) -> Figure:
    scale = 2.0**30 if measure == "peak_bytes" else 1.0
    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="rows N", ylabel=label)
    axes.set_xscale("log", base=2)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for index, name in enumerate(names):
        style: dict[str, Any] = {"color": _COLOURS[index % 7], "marker": _MARKERS[index % 7]}
        own = [row for row in rows if row["implementation"] == name]
        points = sorted({row["n"]: row[measure] / scale for row in own if row.get(measure)}.items())
        if points:
            shown = name if name == "pysupcon" else PEERS[name].detail
            axes.plot(*zip(*points, strict=True), label=shown, **style)
        if measure == "peak_bytes":
            _mark_too_large(axes, own, points, scale, style["color"])
    if measure == "peak_bytes":
        _mark_limit(axes, machine, scale)
    axes.set_title(
        f"SupCon, D={rows[0]['dim']}, {rows[0]['dtype']}\n{machine_name(dict(machine))}", fontsize=9
    )
    axes.grid(which="major", alpha=0.3)
    axes.margins(x=0.17 if measure == "peak_bytes" else 0.05)  # room for the numbers beside crosses
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _mark_too_large(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    points: Sequence[tuple[int, float]],
    scale: float,
    colour: str,
) -> None:
    """Mark points that need more memory than was free by a cross, joined by a dotted line."""
    absent = sorted({row["n"]: row["needs_bytes"] / scale for row in rows if row.get("needs_bytes")}.items())
    if absent:
        axes.plot(*zip(*points[-1:], *absent, strict=True), linestyle=":", color=colour)
        axes.plot(*zip(*absent, strict=True), linestyle="", marker="x", markersize=10, color=colour)
        axes.annotate(
            f"needs {absent[-1][1]:.0f} GiB",
            absent[-1],
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
        )


def _mark_limit(axes: Any, machine: Mapping[str, Any], scale: float) -> None:
    limit = machine.get("gpu_memory_bytes") or machine["memory_bytes"]
    if limit:
        axes.axhline(limit / scale, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"this machine: {limit / scale:.0f} GiB", (0.01, limit / scale), xytext=(0, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8,
        )  # fmt: skip
