"""One row per epoch: summary.csv in the folder of a run, and a line in the terminal."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from pysupcon.trainer.files import named_disk_errors, replace_file

FILE = "summary.csv"
MEANS = ("loss", "gradient_norm", "contrastive_accuracy", "positive_similarity", "negative_similarity")
"""Columns that are means over the steps of the epoch that have the value."""
LAST = (
    "val_loss", "val_contrastive_accuracy", "val_accuracy", "val_worst_group", "val_worst_known_group",
    "learning_rate", "peak_memory_mib",
)  # fmt: skip
"""Columns of the epoch's last step that has the value."""
COLUMNS = ("epoch", "step", *MEANS, *LAST, "images_per_second")


class EpochSummary:
    """Collect the lines of the log and summarise each epoch.

    The rows are computed from the lines of the log, so that a resumed training has the rows of an
    uninterrupted one.

    Args:
        path: summary.csv, which :meth:`write` replaces.
        lines: lines of the log before the resumed step.
        steps_per_epoch: optimizer steps per epoch.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]], steps_per_epoch: int) -> None:
        self._path, self._steps_per_epoch = path, steps_per_epoch
        self._rows: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any], *, last: bool = False) -> dict[str, Any] | None:
        """Add a line of the log.

        Args:
            line: the line.
            last: the training ends, so that an incomplete epoch has a row too.

        Returns:
            The row of the epoch if the line ends it, else None.
        """
        self._lines.append(line)
        if line["step"] % self._steps_per_epoch and not last:
            return None
        row = _summarise(self._lines, math.ceil(line["step"] / self._steps_per_epoch))
        self._rows.append(row)
        self._lines = []
        return row

    def write(self) -> None:
        """Write the file.

        Raises:
            RunError: the file could not be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        with named_disk_errors(self._path):
            replace_file(self._path, text.getvalue().encode())


def describe(row: dict[str, Any], epochs: int) -> str:
    """Return the row of an epoch as a line for the terminal.

    Args:
        row: as returned by :meth:`EpochSummary.add`.
        epochs: number of epochs of the training.
    """
    parts = [f"loss {row['loss']:.4g}"]
    for name, text in (
        ("val_loss", "val loss"),
        ("contrastive_accuracy", "contrastive accuracy"),
        ("val_accuracy", "val accuracy"),
        ("val_worst_group", "val worst group"),
        ("val_worst_known_group", "val worst known group"),
    ):
        if name in row:
            parts.append(f"{text} {row[name]:.4g}")
    return f"epoch {row['epoch']}/{epochs}: {', '.join(parts)}, {row['images_per_second']:,.0f} images/s"


def _summarise(lines: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": epoch, "step": lines[-1]["step"]}
    for name in MEANS:
        values = [line[name] for line in lines if name in line]
        if values:
            row[name] = sum(values) / len(values)
    for name in LAST:
        values = [line[name] for line in lines if name in line]
        if values:
            row[name] = values[-1]
    # The steps have the same number of images: the mean speed is the harmonic mean.
    speeds = [line["images_per_second"] for line in lines]
    row["images_per_second"] = len(speeds) / sum(1 / speed for speed in speeds)
    return row
