"""Pictures of an evaluation, as PNG files: the embedding in two dimensions, and the course of the loss.

Knows numbers only. Colours can be told apart with any kind of colour vision; what they say is also said by
markers and by text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours chosen for all kinds of colour vision (Petroff 2021, arXiv 2107.02270).
_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
_MARKERS = "o^sDvP*X<>ph"
_LEGEND_LIMIT = 24
_LABEL_LIMIT = 24


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure outside of pyplot: no global state, no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def _colours(count: int) -> list[Any]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 1, count)))


def draw_embedding(
    path: str | Path,
    points: NDArray[Any],
    fine: Sequence[int] | NDArray[Any],
    coarse: Sequence[int] | NDArray[Any],
    *,
    title: str,
    axes: tuple[str, str],
    fine_names: Mapping[int, str] | None = None,
    coarse_names: Mapping[int, str] | None = None,
) -> None:
    """Draws ``points`` [M, 2], one colour for each fine class, one marker for each coarse class.

    Args:
        path: of the PNG file.
        points: [M, 2], finite.
        fine, coarse: [M] labels of the points.
        title: of the picture.
        axes: names of the two directions.
        fine_names, coarse_names: what to call a label; "class <label>" where it has none.
    """
    points, fine, coarse = np.asarray(points), np.asarray(fine), np.asarray(coarse)
    if (
        points.ndim != 2
        or points.shape[1] != 2
        or fine.shape != (len(points),)
        or coarse.shape != (len(points),)
    ):
        raise ValueError(
            "points must be of shape [M, 2] and fine and coarse of shape [M], "
            f"got {list(points.shape)}, {list(fine.shape)} and {list(coarse.shape)}"
        )
    fine_names, coarse_names = fine_names or {}, coarse_names or {}
    figure, plot = _figure(9.0, 6.5)
    parts = sorted({(int(c), int(f)) for c, f in zip(coarse, fine, strict=True)})
    classes = sorted({c for c, _ in parts})
    markers = {c: _MARKERS[rank % len(_MARKERS)] for rank, c in enumerate(classes)}
    one_level = all(c == f for c, f in parts)
    legend = len(parts) <= _LEGEND_LIMIT
    colours = dict(zip(parts, _colours(len(parts)), strict=True))
    for (c, f), colour in colours.items():
        chosen = points[(coarse == c) & (fine == f)]
        name = str(fine_names.get(f, f"class {f}"))
        label = name if one_level else f"{name} ({coarse_names.get(c, f'coarse class {c}')})"
        plot.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=22,
            color=[colour],
            marker=markers[c],
            alpha=0.8,
            linewidths=0.3,
            edgecolors="white",
            label=label if legend else None,
        )
        if len(parts) <= _LABEL_LIMIT:
            _name_at(plot, np.median(chosen, axis=0), str(fine_names.get(f, f)))
    if not legend and len(classes) <= _LEGEND_LIMIT:
        for c in classes:
            label = str(coarse_names.get(c, f"coarse class {c}"))
            members = [colour for part, colour in colours.items() if part[0] == c]
            plot.scatter([], [], color=[members[len(members) // 2]], marker=markers[c], label=label)
    if legend or len(classes) <= _LEGEND_LIMIT:
        heading = "fine class" if one_level else "fine class (coarse class)" if legend else "coarse class"
        figure.legend(title=heading, loc="outside right upper", frameon=False, fontsize=9)
    plot.set(title=title, xlabel=axes[0], ylabel=axes[1])
    plot.set_aspect("equal", adjustable="datalim")
    plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _name_at(plot: Axes, position: NDArray[Any], name: str) -> None:
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    plot.text(
        float(position[0]),
        float(position[1]),
        name,
        ha="center",
        va="center",
        fontsize=10,
        fontweight="bold",
        bbox=box,
    )


def smoothed(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Means of ``values`` [S] over themselves and ``window // 2`` neighbours on either side, [S] fp64.

    Towards the ends fewer, but as many on one side as on the other: the curve neither lags nor bends.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    middle = np.arange(len(sums) - 1)
    reach = np.minimum(window // 2, np.minimum(middle, len(middle) - 1 - middle))
    return (sums[middle + reach + 1] - sums[middle - reach]) / (2 * reach + 1)


def draw_loss(
    path: str | Path,
    steps: Sequence[int] | NDArray[Any],
    losses: Mapping[str, Sequence[float] | NDArray[Any]],
    *,
    title: str,
    chance: Mapping[str, Sequence[float] | NDArray[Any]] | None = None,
) -> None:
    """Draws losses over optimiser steps: faintly as they came, and as means over a twenty-fifth of them.

    Args:
        path: of the PNG file.
        steps: [S] numbers of the steps, ascending.
        losses: by name, [S] each; a NaN is a gap.
        title: of the picture.
        chance: by the same names, [S]: the loss of an encoder that knows nothing, drawn dashed.
    """
    steps = np.asarray(steps)
    for name, values in {**losses, **(chance or {})}.items():
        if np.shape(values) != (len(steps),):
            raise ValueError(
                f"loss {name!r} must have shape [S]=[{len(steps)}], got {list(np.shape(values))}"
            )
    figure, plot = _figure(9.0, 5.0)
    window = max(1, len(steps) // 25)
    for colour, (name, values) in zip(_colours(max(len(losses), 1)), losses.items(), strict=False):
        known = np.isfinite(np.asarray(values, dtype=np.float64))
        at, curve = steps[known], np.asarray(values, dtype=np.float64)[known]
        if window > 1:
            plot.plot(at, curve, color=colour, alpha=0.25, linewidth=0.8)
        marker = "o" if len(at) == 1 else None
        plot.plot(at, smoothed(curve, window), color=colour, linewidth=1.8, marker=marker, label=name)
        if chance and name in chance:
            plot.plot(
                steps, chance[name], color=colour, linestyle="--", linewidth=1.2, label=f"{name}: chance"
            )
    plot.set(title=title, xlabel="optimiser step", ylabel="loss (nats)")
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    figure.savefig(path, format="png")
