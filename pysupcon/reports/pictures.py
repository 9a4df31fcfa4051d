"""Pictures of an evaluation as PNG files: the embedding in two dimensions, and the training loss.

The functions take arrays and know nothing about runs. The colours suit all kinds of colour vision, and
markers and text repeat their information.
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
MARKERS = "o^sDvP*X<>ph"
_LEGEND_LIMIT = 24
_LABEL_LIMIT = 24


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure without pyplot, so without global state and without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def printable(text: object) -> str:
    """Return text that a font and UTF-8 can represent: a file name may hold bytes that are not UTF-8."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def legend_label(name: object) -> str:
    """Return ``name`` as a label that a legend shows: matplotlib omits labels with an underscore in front."""
    text = printable(name)
    return f" {text}" if text.startswith("_") else text


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG file that shows every text as it is: names of classes and runs are not math or TeX."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
        text.set_parse_math(False)
        text.set_usetex(False)
    with rc_context({"text.parse_math": False, "text.usetex": False}):  # tick labels are made while drawing
        figure.savefig(path, format="png")


def palette(count: int) -> list[Any]:
    """Return ``count`` distinct colours."""
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
    """Draw points with one colour per fine class and one marker per coarse class.

    Args:
        path: path of the PNG file.
        points: [M, 2], finite.
        fine, coarse: [M] labels of the points.
        title: title of the picture.
        axes: labels of the two axes.
        fine_names, coarse_names: names by label; a label without a name is shown as "class <label>".

    Raises:
        ValueError: the shapes do not fit together.
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
    figure, plot = new_figure(9.0, 6.5)
    parts = sorted({(int(c), int(f)) for c, f in zip(coarse, fine, strict=True)})
    classes = sorted({c for c, _ in parts})
    markers = {c: MARKERS[rank % len(MARKERS)] for rank, c in enumerate(classes)}
    one_level = all(c == f for c, f in parts)
    legend = len(parts) <= _LEGEND_LIMIT
    colours = dict(zip(parts, palette(len(parts)), strict=True))
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
            label=legend_label(label) if legend else None,
        )
        if len(parts) <= _LABEL_LIMIT:
            _name_at(plot, np.median(chosen, axis=0), str(fine_names.get(f, f)))
    if not legend and len(classes) <= _LEGEND_LIMIT:
        for c in classes:
            label = str(coarse_names.get(c, f"coarse class {c}"))
            members = [colour for part, colour in colours.items() if part[0] == c]
            plot.scatter(
                [], [], color=[members[len(members) // 2]], marker=markers[c], label=legend_label(label)
            )
    if legend or len(classes) <= _LEGEND_LIMIT:
        heading = "fine class" if one_level else "fine class (coarse class)" if legend else "coarse class"
        figure.legend(title=heading, loc="outside right upper", frameon=False, fontsize=9)
    plot.set(title=title, xlabel=axes[0], ylabel=axes[1])
    plot.set_aspect("equal", adjustable="datalim")
    plot.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


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
    """Return centred running means of ``values`` [S] over ``window // 2`` neighbours on each side, [S]
    float64.

    Near the ends the window shrinks symmetrically, so that the curve is not biased.
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
    validation: Mapping[str, Sequence[float] | NDArray[Any]] | None = None,
) -> None:
    """Draw losses over optimizer steps: raw values in a light colour, and running means.

    Args:
        path: path of the PNG file.
        steps: [S] step numbers, ascending.
        losses: [S] losses by name; NaN is a gap.
        title: title of the picture.
        chance: [S] chance levels by the same names, drawn as dashed lines.
        validation: [S] validation losses by the same names, drawn as circles; NaN between the validations.

    Raises:
        ValueError: a shape does not fit ``steps``.
    """
    steps = np.asarray(steps)
    for name, values in [pair for part in (losses, chance, validation) for pair in (part or {}).items()]:
        if np.shape(values) != (len(steps),):
            raise ValueError(
                f"loss {name!r} must have shape [S]=[{len(steps)}], got {list(np.shape(values))}"
            )
    figure, plot = new_figure(9.0, 5.0)
    window = max(1, len(steps) // 25)
    for colour, (name, values) in zip(palette(max(len(losses), 1)), losses.items(), strict=False):
        known = np.isfinite(np.asarray(values, dtype=np.float64))
        known_steps, curve = steps[known], np.asarray(values, dtype=np.float64)[known]
        if window > 1:
            plot.plot(known_steps, curve, color=colour, alpha=0.25, linewidth=0.8)
        marker = "o" if len(known_steps) == 1 else None
        plot.plot(
            known_steps, smoothed(curve, window), color=colour, linewidth=1.8, marker=marker, label=name
        )
        if chance and name in chance:
            plot.plot(
                steps, chance[name], color=colour, linestyle="--", linewidth=1.2, label=f"{name}: chance"
            )
        if validation and name in validation:
            held_out = np.asarray(validation[name], dtype=np.float64)
            known = np.isfinite(held_out)
            label = f"{name}: validation"
            plot.plot(
                steps[known], held_out[known], "o:", color=colour, markersize=4, linewidth=1, label=label
            )
    plot.set(title=title, xlabel="optimizer step", ylabel="loss (nats)")
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    save_figure(figure, path)
