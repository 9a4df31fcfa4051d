"""Pictures of outcomes and comparisons, as PNG files: histograms, ROC and PR curves, confusion matrices,
groups, paired differences. Knows numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pysupcon.reports.pictures import _MARKERS, _colours, _figure
from pysupcon.reports.report import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Names = Mapping[int, str]
_NUMBERS_UP_TO = 20
_CURVES_UP_TO = 20
_LEVELS = ("fine", "coarse")
#: Every file that :func:`draw_outcomes` may write.
OUTCOME_FILES = (
    *(f"{kind}_{level}.png" for level in _LEVELS for kind in ("separation", "curves", "confusion")),
    "groups.png",
)


def draw_separation(path: str | Path, target: NDArray[Any], noise: NDArray[Any], *, title: str) -> None:
    """Histograms of target and noise cosines [N] each, NaN left out, with their medians and the margin."""
    figure, plot = _figure(8.0, 4.5)
    values = {"target: same class": target, "noise: other class": noise}
    known = {name: value[np.isfinite(value)] for name, value in values.items()}
    low = min(value.min() for value in known.values())
    high = max(value.max() for value in known.values())
    pad = max(0.02 * (high - low), 1e-3)
    bins = np.linspace(low - pad, min(high + pad, 1.0 + pad), 61).tolist()
    medians = []
    for colour, (name, value) in zip(_colours(2), known.items(), strict=True):
        plot.hist(value, bins=bins, color=colour, alpha=0.55, label=name)
        plot.hist(value, bins=bins, color=colour, histtype="step", linewidth=1.4)
        medians.append(float(np.median(value)))
        plot.axvline(medians[-1], color=colour, linestyle="--", linewidth=1.6)
    margin = abs(medians[0] - medians[1])
    top = plot.get_ylim()[1] * 1.1
    plot.set_ylim(0, top)
    plot.annotate(
        "", (medians[0], 0.95 * top), (medians[1], 0.95 * top), arrowprops={"arrowstyle": "<->", "lw": 1.2}
    )
    plot.set(
        title=f"{title}: margin of medians {margin:.3f}",
        xlabel="cosine to the most similar training sample (dashed: median)",
        ylabel="test samples",
    )
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, format="png")


def draw_curves(
    path: str | Path,
    target: NDArray[Any],
    noise: NDArray[Any],
    labels: NDArray[Any],
    *,
    title: str,
    names: Names | None = None,
) -> None:
    """ROC and PR curves of telling target from noise cosines, per class and (black) of all.

    Args:
        target, noise: [N] scores, NaN left out.
        labels: [N] the class of each sample; beyond twenty classes only the curve of all is drawn.
        names: of the classes.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    known = np.isfinite(target) & np.isfinite(noise)
    target, noise, labels = target[known], noise[known], labels[known]
    classes = sorted({int(label) for label in labels})
    parts: list[tuple[str, Any, NDArray[Any]]] = []
    if len(classes) <= _CURVES_UP_TO:
        colours = _colours(len(classes))
        for colour, label in zip(colours, classes, strict=True):
            parts.append(((names or {}).get(label, f"class {label}"), colour, labels == label))
    parts.append(("all", "black", np.ones(len(labels), dtype=bool)))
    figure = Figure(figsize=(11.0, 5.4), dpi=120, layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for name, colour, member in parts:
        scores = np.concatenate([target[member], noise[member]])
        truth = np.repeat([1, 0], int(member.sum()))
        width = 2.2 if name == "all" else 1.3
        false_rate, true_rate, _ = roc_curve(truth, scores)
        precision, recall, _ = precision_recall_curve(truth, scores)
        auc, ap = roc_auc_score(truth, scores), average_precision_score(truth, scores)
        roc.plot(false_rate, true_rate, color=colour, linewidth=width)
        text = f"{name}: AUC {auc:.3f}, AP {ap:.3f}"
        pr.step(recall, precision, where="post", color=colour, linewidth=width, label=text)
    roc.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    pr.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    roc.set(title="ROC", xlabel="noise taken for target", ylabel="target found")
    pr.set(title="PR", xlabel="recall", ylabel="precision", ylim=(min(0.45, pr.get_ylim()[0]), 1.02))
    for plot in (roc, pr):
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def draw_confusion(
    path: str | Path, truth: NDArray[Any], predicted: NDArray[Any], *, title: str, names: Names | None = None
) -> None:
    """The confusion matrix of labels [N] each: rows true, columns predicted, coloured by the share of the
    row.

    Counts are written into the cells of up to twenty classes. Colours are of the square root of the share, so
    that a few errors among many right ones are seen.
    """
    from matplotlib.colors import PowerNorm

    classes, flat = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    size = len(classes)
    matrix = np.zeros((size, size), dtype=np.int64)
    np.add.at(matrix, (flat[: len(truth)], flat[len(truth) :]), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4.0 + 0.42 * size, 12.0)
    figure, plot = _figure(side + 1.5, side)
    image = plot.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    bar = figure.colorbar(image, ax=plot, label="share of the true class", shrink=0.8)
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1.0])
    texts = [str((names or {}).get(int(label), int(label))) for label in classes]
    if size <= _NUMBERS_UP_TO:
        ticks = range(size)
        for row in range(size):
            for column in range(size):
                if matrix[row, column]:
                    colour = "white" if share[row, column] > 0.35 else "black"
                    plot.text(
                        column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=9
                    )
    else:
        ticks = range(0, size, -(-size // 25))
    turn = 90 if max(len(texts[tick]) for tick in ticks) > 4 else 0
    plot.set_xticks(list(ticks), [texts[tick] for tick in ticks], rotation=turn)
    plot.set_yticks(list(ticks), [texts[tick] for tick in ticks])
    accuracy = 100 * np.trace(matrix) / max(matrix.sum(), 1)
    plot.set(title=f"{title}: {accuracy:.1f} % right", xlabel="predicted", ylabel="true")
    figure.savefig(path, format="png")


def draw_groups(
    path: str | Path,
    correct: Mapping[str, NDArray[Any]],
    group: NDArray[Any],
    *,
    title: str,
    names: Names | None = None,
) -> None:
    """Accuracy of every group by method, as bars; each method's worst group and mean are drawn as lines.

    Args:
        correct: by method, [N] bool.
        group: [N] labels.
        names: of the groups.
    """
    groups = np.unique(group)
    figure, plot = _figure(min(3.5 + 0.8 * len(groups), 14.0), 4.8)
    width = 0.8 / len(correct)
    colours = _colours(len(correct))
    for rank, (method, values) in enumerate(correct.items()):
        accuracies = [100 * values[group == g].mean() for g in groups]
        at = np.arange(len(groups)) + (rank - (len(correct) - 1) / 2) * width
        label = f"{method}: mean {100 * values.mean():.1f} %, worst group {min(accuracies):.1f} %"
        plot.bar(at, accuracies, width=0.92 * width, color=colours[rank], label=label)
        plot.axhline(min(accuracies), color=colours[rank], linestyle="--", linewidth=1)
    labels = [f"{(names or {}).get(int(g), f'group {g}')}\nn={int((group == g).sum())}" for g in groups]
    turn = 90 if len(groups) > 8 else 0
    plot.set_xticks(range(len(groups)), labels, fontsize=8, rotation=turn)
    plot.set(title=title, ylabel="test accuracy (%); dashed: worst group", ylim=(0, 102))
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def draw_differences(
    path: str | Path,
    rows: Sequence[tuple[str, str, float, float, float]],
    *,
    title: str,
    unit: str,
) -> None:
    """Differences with their intervals, one line each; hollow where the interval holds 0.

    Args:
        rows: (figure, configuration, difference, low, high), rows of one figure together.
        unit: of the differences.
    """
    figure, plot = _figure(9.0, min(1.6 + 0.32 * len(rows), 24.0))
    configurations = list(dict.fromkeys(row[1] for row in rows))
    colours = dict(zip(configurations, _colours(len(configurations)), strict=True))
    seen: set[str] = set()
    for position, (_, configuration, difference, low, high) in enumerate(rows):
        colour, sure = colours[configuration], low > 0 or high < 0
        label = None if configuration in seen else configuration
        seen.add(configuration)
        plot.plot([low, high], [position, position], color=colour, linewidth=2)
        face = colour if sure else "white"
        plot.plot(difference, position, "o", color=colour, markerfacecolor=face, markersize=7, label=label)
    starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1][0] != row[0]]
    ends = [*starts[1:], len(rows)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    plot.set_yticks(middles, [rows[start][0] for start in starts])
    for start in starts[1:]:
        plot.axhline(start - 0.5, color="grey", linewidth=0.4)
    plot.axvline(0, color="black", linewidth=1)
    plot.set(title=title, xlabel=f"difference ({unit}); hollow: the interval holds 0")
    plot.set_ylim(len(rows) - 0.5, -0.5)
    plot.grid(axis="x", alpha=0.25)
    plot.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def scatter_circle(plot: Axes, points: NDArray[Any], labels: NDArray[Any], *, title: str) -> None:
    """Points [N, 2] of the unit circle, one colour a class, on ``plot``."""
    angle = np.linspace(0, 2 * np.pi, 200)
    plot.plot(np.cos(angle), np.sin(angle), color="lightgrey", linewidth=1, zorder=0)
    classes = np.unique(labels)
    for colour, marker, label in zip(_colours(len(classes)), _MARKERS * len(classes), classes, strict=False):
        chosen = points[labels == label]
        plot.scatter(chosen[:, 0], chosen[:, 1], s=26, color=colour, marker=marker, alpha=0.75, linewidths=0)
    plot.set_title(title, fontsize=9)
    plot.set_aspect("equal")
    plot.set_axis_off()


def draw_outcomes(
    folder: Path, outcomes: Mapping[str, NDArray[Any]], names: Mapping[str, Names]
) -> list[Picture]:
    """Every picture that ``outcomes`` ([N_test] each, by name) allow, into ``folder``.

    Args:
        outcomes: with ``labels/fine`` and ``labels/coarse``.
        names: of the labels, by level, "fine" and "coarse".
    """
    pictures = []
    one_level = np.array_equal(outcomes["labels/fine"], outcomes["labels/coarse"])
    for level in _LEVELS[:1] if one_level else _LEVELS:
        truth = outcomes[f"labels/{level}"]
        target, noise = (outcomes.get(f"separation/{level}/{kind}") for kind in ("target", "noise"))
        if target is not None and noise is not None:
            title = f"{level} classes"
            draw_separation(folder / f"separation_{level}.png", target, noise, title=title)
            pictures.append(
                Picture(
                    f"separation_{level}.png",
                    "Cosine of each test sample to the most similar training sample of its own "
                    f"{level} class (target) and of another one (noise).",
                )
            )
            draw_curves(folder / f"curves_{level}.png", target, noise, truth, title=title, names=names[level])
            caption = f"Telling target from noise cosines, by {level} class: ROC and precision-recall curves."
            pictures.append(Picture(f"curves_{level}.png", caption))
        judge = _first_judge(outcomes, level)
        if judge is not None:
            predicted = outcomes[f"{judge}/predicted"]
            title = judge.rpartition("/")[0]
            draw_confusion(
                folder / f"confusion_{level}.png", truth, predicted, title=title, names=names[level]
            )
            pictures.append(
                Picture(f"confusion_{level}.png", f"Confusion of the {level} classes by {title}.")
            )
    methods = {
        name.split("/")[1]: values
        for name, values in outcomes.items()
        if name.startswith("worst_group/") and name.endswith("/correct")
    }
    if methods:
        group = outcomes[f"worst_group/{next(iter(methods))}/group"]
        labels = {}
        for g in np.unique(group):
            at = int(np.flatnonzero(group == g)[0])
            label = {level: int(outcomes[f"labels/{level}"][at]) for level in _LEVELS}
            coarse, fine = (str(names[level].get(label[level], label[level])) for level in ("coarse", "fine"))
            # A group's name often begins with its class's.
            labels[int(g)] = fine.replace(", ", "\n") if fine.startswith(coarse) else f"{coarse}\n{fine}"
        draw_groups(folder / "groups.png", methods, group, title="Accuracy by true group", names=labels)
        pictures.append(Picture("groups.png", "Test accuracy by true group and by how the head was trained."))
    return pictures


def _first_judge(outcomes: Mapping[str, Any], level: str) -> str | None:
    """The classifier whose confusion is shown: a linear probe, or else the fewest neighbours."""
    neighbours = [
        name for name in outcomes if name.startswith("knn/") and name.endswith(f"/{level}/predicted")
    ]
    neighbours.sort(key=lambda name: int(name.split("=")[1].split("/")[0]))
    for name in (f"coarse_to_fine/{level}/predicted", f"linear_probe/{level}/predicted", *neighbours):
        if name in outcomes:
            return name.removesuffix("/predicted")
    return None
