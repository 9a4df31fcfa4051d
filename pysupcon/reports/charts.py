"""Pictures of outcomes and comparisons as PNG files: histograms, ROC and PR curves, confusion matrices, group
accuracies, paired differences. The functions take arrays and know nothing about runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pysupcon.reports.pictures import MARKERS, legend_label, new_figure, palette, printable, save_figure
from pysupcon.reports.report import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Names = Mapping[int, str]
_MAX_CLASSES_WITH_COUNTS = 20
_MAX_CLASSES_WITH_CURVES = 20
_LEVELS = ("fine", "coarse")
OUTCOME_FILES = (
    *(f"{kind}_{level}.png" for level in _LEVELS for kind in ("separation", "curves", "confusion")),
    "groups.png",
)
"""Every file that :func:`draw_outcomes` may write."""


def histogram_bins(values: NDArray[Any]) -> list[float]:
    """Edges of 60 equal bins from the 1 % quantile of ``values`` [N] to their maximum."""
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    pad = 0.02 * (high - low) or 1e-3
    edges: list[float] = np.linspace(low - pad, high + pad, 61).tolist()
    return edges


def draw_separation(path: str | Path, target: NDArray[Any], noise: NDArray[Any], *, title: str) -> None:
    """Draw histograms of target and noise cosines with their medians and the margin.

    The axis begins at the 1 % quantile, because single samples far below would press all others into one bin;
    the first bin holds what lies below.

    Args:
        path: path of the PNG file.
        target, noise: [N] cosines; NaN is skipped.
        title: title of the picture.
    """
    figure, plot = new_figure(8.0, 4.5)
    values = {"target: same class": target, "noise: other class": noise}
    known = {name: value[np.isfinite(value)] for name, value in values.items()}
    pooled = np.concatenate(list(known.values()))
    bins = histogram_bins(pooled)
    below = int((pooled < bins[0]).sum())
    medians = []
    for colour, (name, value) in zip(palette(2), known.items(), strict=True):
        shown = np.maximum(value, bins[0])
        plot.hist(shown, bins=bins, color=colour, alpha=0.55, label=name)
        plot.hist(shown, bins=bins, color=colour, histtype="step", linewidth=1.4)
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
        xlabel="cosine to the most similar training sample (dashed: median)"
        + (f"; {below} of {len(pooled)} lie further left, in the first bin" if below else ""),
        ylabel="test samples",
    )
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def draw_curves(
    path: str | Path,
    target: NDArray[Any],
    noise: NDArray[Any],
    labels: NDArray[Any],
    *,
    title: str,
    names: Names | None = None,
) -> None:
    """Draw ROC and PR curves of the separation of target from noise cosines, per class and for all samples.

    Args:
        path: path of the PNG file.
        target, noise: [N] scores; NaN is skipped.
        labels: [N] classes. With more than 20 classes only the curve of all samples is drawn.
        title: title of the picture.
        names: names of the classes by label.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    known = np.isfinite(target) & np.isfinite(noise)
    target, noise, labels = target[known], noise[known], labels[known]
    classes = sorted({int(label) for label in labels})
    parts: list[tuple[str, Any, NDArray[Any]]] = []
    if len(classes) <= _MAX_CLASSES_WITH_CURVES:
        colours = palette(len(classes))
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
        text = legend_label(f"{name}: AUC {auc:.3f}, AP {ap:.3f}")
        pr.step(recall, precision, where="post", color=colour, linewidth=width, label=text)
    roc.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    pr.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    roc.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
    pr.set(title="PR", xlabel="recall", ylabel="precision", ylim=(min(0.45, pr.get_ylim()[0]), 1.02))
    for plot in (roc, pr):
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_confusion(
    path: str | Path, truth: NDArray[Any], predicted: NDArray[Any], *, title: str, names: Names | None = None
) -> None:
    """Draw the confusion matrix: rows are true classes, columns predicted ones.

    With up to 20 classes the cells show counts. The colour is the square root of the share of the row, so
    that rare errors are visible.

    Args:
        path: path of the PNG file.
        truth, predicted: [N] labels.
        title: title of the picture.
        names: names of the classes by label.
    """
    from matplotlib.colors import PowerNorm

    classes, flat = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    size = len(classes)
    matrix = np.zeros((size, size), dtype=np.int64)
    np.add.at(matrix, (flat[: len(truth)], flat[len(truth) :]), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4.0 + 0.42 * size, 12.0)
    figure, plot = new_figure(side + 1.5, side)
    image = plot.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    bar = figure.colorbar(image, ax=plot, label="fraction of the true class (square-root scale)", shrink=0.8)
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1.0])
    texts = [printable((names or {}).get(int(label), int(label))) for label in classes]
    if size <= _MAX_CLASSES_WITH_COUNTS:
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
    rotation = 90 if max(len(texts[tick]) for tick in ticks) > 4 else 0
    plot.set_xticks(list(ticks), [texts[tick] for tick in ticks], rotation=rotation)
    plot.set_yticks(list(ticks), [texts[tick] for tick in ticks])
    accuracy = 100 * np.trace(matrix) / max(matrix.sum(), 1)
    plot.set(title=f"{title}: accuracy {accuracy:.1f} %", xlabel="predicted", ylabel="true")
    save_figure(figure, path)


def draw_groups(
    path: str | Path,
    correct: Mapping[str, NDArray[Any]],
    group: NDArray[Any],
    *,
    title: str,
    names: Names | None = None,
) -> None:
    """Draw the accuracy of every group by method as bars, with a line at each method's worst group.

    Args:
        path: path of the PNG file.
        correct: [N] bool by method: whether each sample is classified correctly.
        group: [N] groups.
        title: title of the picture.
        names: names of the groups by number.
    """
    groups = np.unique(group)
    figure, plot = new_figure(min(3.5 + 0.8 * len(groups), 14.0), 4.8)
    width = 0.8 / len(correct)
    colours = palette(len(correct))
    for rank, (method, values) in enumerate(correct.items()):
        accuracies = [100 * values[group == g].mean() for g in groups]
        positions = np.arange(len(groups)) + (rank - (len(correct) - 1) / 2) * width
        label = f"{method}: mean {100 * values.mean():.1f} %, worst group {min(accuracies):.1f} %"
        plot.bar(positions, accuracies, width=0.92 * width, color=colours[rank], label=label)
        plot.axhline(min(accuracies), color=colours[rank], linestyle="--", linewidth=1)
    labels = [f"{(names or {}).get(int(g), f'group {g}')}\nn={int((group == g).sum())}" for g in groups]
    rotation = 90 if len(groups) > 8 else 0
    plot.set_xticks(range(len(groups)), [printable(label) for label in labels], fontsize=8, rotation=rotation)
    plot.set(title=title, ylabel="test accuracy (%); dashed: worst group", ylim=(0, 102))
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_differences(
    path: str | Path,
    rows: Sequence[tuple[str, str, float, float, float]],
    *,
    title: str,
    unit: str,
    note: str = "",
) -> None:
    """Draw differences with their intervals; the marker is hollow if the interval contains 0.

    Args:
        path: path of the PNG file.
        rows: (figure, configuration, difference, low, high), grouped by figure.
        title: title of the picture.
        unit: unit of the differences.
        note: a line above the legend, e.g. what the intervals resample.
    """
    figure, plot = new_figure(9.0, min(1.6 + 0.32 * len(rows), 24.0))
    configurations = list(dict.fromkeys(row[1] for row in rows))
    colours = dict(zip(configurations, palette(len(configurations)), strict=True))
    seen: set[str] = set()
    for position, (_, configuration, difference, low, high) in enumerate(rows):
        colour, significant = colours[configuration], low > 0 or high < 0
        label = None if configuration in seen else legend_label(configuration)
        seen.add(configuration)
        plot.plot([low, high], [position, position], color=colour, linewidth=2)
        face = colour if significant else "white"
        plot.plot(difference, position, "o", color=colour, markerfacecolor=face, markersize=7, label=label)
    starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1][0] != row[0]]
    ends = [*starts[1:], len(rows)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    plot.set_yticks(middles, [printable(rows[start][0]) for start in starts])
    for start in starts[1:]:
        plot.axhline(start - 0.5, color="grey", linewidth=0.4)
    plot.axvline(0, color="black", linewidth=1)
    plot.set(title=title, xlabel=f"difference ({unit}); hollow: the interval contains 0")
    plot.set_ylim(len(rows) - 0.5, -0.5)
    plot.grid(axis="x", alpha=0.25)
    plot.spines[["top", "right", "left"]].set_visible(False)
    # The legend has the width of the figure; long names of metrics leave the axis less.
    note = fill(printable(note), 110)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, title=note, title_fontsize=9)
    save_figure(figure, path)


def scatter_circle(plot: Axes, points: NDArray[Any], labels: NDArray[Any], *, title: str) -> None:
    """Draw points [N, 2] of the unit circle on ``plot``, one colour per class."""
    angle = np.linspace(0, 2 * np.pi, 200)
    plot.plot(np.cos(angle), np.sin(angle), color="lightgrey", linewidth=1, zorder=0)
    classes = np.unique(labels)
    for colour, marker, label in zip(palette(len(classes)), MARKERS * len(classes), classes, strict=False):
        chosen = points[labels == label]
        plot.scatter(chosen[:, 0], chosen[:, 1], s=26, color=colour, marker=marker, alpha=0.75, linewidths=0)
    plot.set_title(title, fontsize=9)
    plot.set_aspect("equal")
    plot.set_axis_off()


def draw_outcomes(
    folder: Path, outcomes: Mapping[str, NDArray[Any]], names: Mapping[str, Names]
) -> list[Picture]:
    """Draw every picture for which ``outcomes`` hold the data.

    Args:
        folder: folder of the PNG files.
        outcomes: results per test sample by name, [N_test] each, with ``labels/fine`` and ``labels/coarse``.
        names: names of the labels by level, "fine" and "coarse".

    Returns:
        The pictures with their captions.
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
            caption = f"Target against noise cosines by {level} class: ROC and precision-recall curves."
            pictures.append(Picture(f"curves_{level}.png", caption))
        classifier = _select_classifier(outcomes, level)
        if classifier is not None:
            predicted = outcomes[f"{classifier}/predicted"]
            title = classifier.rpartition("/")[0]
            draw_confusion(
                folder / f"confusion_{level}.png", truth, predicted, title=title, names=names[level]
            )
            pictures.append(
                Picture(f"confusion_{level}.png", f"Confusion matrix of the {level} classes by {title}.")
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
            # The name of a group often starts with the name of its class.
            labels[int(g)] = fine.replace(", ", "\n") if fine.startswith(coarse) else f"{coarse}\n{fine}"
        draw_groups(folder / "groups.png", methods, group, title="Accuracy by true group", names=labels)
        pictures.append(Picture("groups.png", "Test accuracy by true group and training method of the head."))
    return pictures


def _select_classifier(outcomes: Mapping[str, Any], level: str) -> str | None:
    """The classifier of the confusion matrix: a linear probe, else k-NN with the smallest k."""
    neighbours = [
        name for name in outcomes if name.startswith("knn/") and name.endswith(f"/{level}/predicted")
    ]
    neighbours.sort(key=lambda name: int(name.split("=")[1].split("/")[0]))
    for name in (f"coarse_to_fine/{level}/predicted", f"linear_probe/{level}/predicted", *neighbours):
        if name in outcomes:
            return name.removesuffix("/predicted")
    return None
