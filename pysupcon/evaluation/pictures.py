"""Pictures of an evaluated run: test features in two dimensions, evaluator outcomes, loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pysupcon.errors import RunError
from pysupcon.evaluators import EvaluationConfig, FeatureSplits, project
from pysupcon.reports.charts import OUTCOME_FILES, draw_outcomes
from pysupcon.reports.pictures import draw_embedding, draw_loss
from pysupcon.reports.report import Picture
from pysupcon.trainer.run import Run

EMBEDDING_FILE = "embedding.png"
LOSS_FILE = "loss.png"
FILES = (EMBEDDING_FILE, LOSS_FILE, *OUTCOME_FILES)
"""Every file that :func:`draw_pictures` may write."""
LOSS_TERMS = (
    "contrastive", "infonce", "cross_entropy", "second_cross_entropy", "reconstruction",
)  # fmt: skip


def draw_pictures(
    folder: Path, run: Run, splits: FeatureSplits, config: EvaluationConfig, outcomes: dict[str, Tensor]
) -> tuple[list[Picture], list[str]]:
    """Draw the test features, the outcomes and the training loss.

    Args:
        folder: folder of the PNG files.
        run: the evaluated run.
        splits: its features.
        config: arguments of the projection to two dimensions.
        outcomes: results per test sample by name, [N_test] each.

    Returns:
        The pictures, and a warning for each picture that could not be drawn.
    """
    points, rows = project(splits.test.features, config.projection)
    rows = rows.to(splits.test.fine.device)
    method = {"tsne": "t-SNE", "pca": "PCA"}[config.projection.method]
    kind = "features" if config.features == "embedding" else "outputs of the projection head"
    test = run.splits()["test"]
    names = {"fine": dict(enumerate(test.fine_names)), "coarse": dict(enumerate(test.coarse_names))}
    draw_embedding(
        folder / EMBEDDING_FILE,
        points.numpy(),
        splits.test.fine[rows].cpu().numpy(),
        splits.test.coarse[rows].cpu().numpy(),
        title=f"Test {kind} of {run.dir.resolve().name}, {method}",
        axes=(f"{method} 1", f"{method} 2"),
        fine_names=names["fine"],
        coarse_names=names["coarse"],
    )
    shown = "all" if len(points) == len(splits.test) else f"{len(points)} of the"
    caption = f"Frozen {kind} of {shown} {len(splits.test)} test images in two dimensions ({method})."
    pictures = [Picture(EMBEDDING_FILE, caption)]
    pictures += draw_outcomes(folder, {name: values.numpy() for name, values in outcomes.items()}, names)
    if run.config.model.concatenated:  # made from trained runs: it has no training log
        return pictures, []
    try:
        curves = loss_curves(run.log())
    except RunError as error:
        return pictures, [f"no loss curve: {error}"]
    draw_loss(
        folder / LOSS_FILE, curves.steps, curves.losses, chance=curves.chance, validation=curves.validation,
        title=f"Loss of {run.dir.resolve().name}",
    )  # fmt: skip
    dashed = "; dashed: the loss if all features were equal (chance level)" if curves.chance else ""
    # The loss of a batch depends on its size.
    circles = (
        "; circles: validation loss, which depends on the size of its batches" if curves.validation else ""
    )
    pictures.append(Picture(LOSS_FILE, f"Training loss and its running mean{circles}{dashed}."))
    return pictures, []


class LossCurves(NamedTuple):
    """Values of S steps; a missing value is NaN."""

    steps: list[int]
    losses: dict[str, list[float]]
    chance: dict[str, list[float]]
    """Chance levels by the name of their loss"""
    validation: dict[str, list[float]]
    """Validation losses by the name of their loss"""


def loss_curves(log: list[dict[str, Any]]) -> LossCurves:
    """Read the steps, the loss terms, chance levels and validation losses from the lines of a training log.

    A loss with a single term is returned as that term. The chance level belongs to the contrastive term.

    Args:
        log: lines of ``log.jsonl``.

    Raises:
        RunError: no line holds a step and a loss, or one of its values is not a number.
    """
    lines = [line for line in log if "step" in line and "loss" in line]
    if not lines:
        raise RunError("the log holds no line with a step and a loss")

    def column(key: str) -> list[float]:
        return [float(line.get(key, "nan")) for line in lines]

    terms = [name for name in LOSS_TERMS if any(name in line for line in lines)]
    names = terms if len(terms) == 1 else ["loss", *terms]
    try:
        chance = {"contrastive": column("chance")} if any("chance" in line for line in lines) else {}
        held_out = {name: column(f"val_{name}") for name in names if any(f"val_{name}" in x for x in lines)}
        steps = [int(line["step"]) for line in lines]
        return LossCurves(steps, {name: column(name) for name in names}, chance, held_out)
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"the log holds a value that is not a number: {error}") from error
