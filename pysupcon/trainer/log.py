"""The log of a run: one JSON line per step."""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pysupcon.errors import RunError
from pysupcon.trainer.files import named_disk_errors, replace_file
from pysupcon.trainer.run import read_log_lines


class StepLog:
    """Append lines to ``log.jsonl``; :meth:`write` flushes each line.

    Attributes:
        failure: the first error of the disk, after which nothing more is written; None if there is none.
        earlier: the lines up to ``resumed_step``.

    Fields of a line:
        step, epoch: progress after the step.
        loss and its terms: means over the processes.
        gradient_norm: before clipping.
        temperature: before the step, if it is learnable.
        group=G/loss, group=G/weight: with GroupDRO; the loss is that of the last batch with samples of G.
        valid_anchors: anchors that have a loss, summed over the processes, if there is a contrastive loss and
            each sample has one label.
        chance: the contrastive loss if all embeddings were equal; likewise.
        contrastive_accuracy, positive_similarity, negative_similarity: every ``trainer.metrics_steps`` steps,
            if there is a contrastive loss (:func:`pysupcon.functional.contrastive_metrics`, over the rows of
            each process); means over the processes. An entry is missing if there is no positive (negative).
        val_loss and its terms: at checkpoints; with ``trainer.metrics_steps`` also these three metrics.
        val_accuracy, val_worst_group: at checkpoints, if ``trainer.best_by`` is an accuracy.
        learning_rate: of this step.
        images_per_second: views per second of all processes.
        peak_memory_mib: of the main process.

    Args:
        path: path of the file; created if missing.
        resumed_step: number of finished steps. Lines of later steps are dropped: these steps are repeated.

    Raises:
        OSError: the file cannot be written.
        RunError: a line of an earlier step is damaged; the message names it.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.earlier = _drop_after(path, resumed_step) if path.exists() else []
        self.failure: OSError | None = None
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. An error of the disk sets ``failure`` and is raised by :meth:`sync`."""
        try:
            if self.failure is None:
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()
        except OSError as error:
            self.failure = error

    def sync(self) -> None:
        """Sync all lines to disk.

        Raises:
            RunError: a line could not be written.
        """
        with named_disk_errors(self._path):
            if self.failure is not None:
                raise self.failure
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # sync has already reported an error
            self._file.close()


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to ``step`` and return them. Lines that a dying process has not finished do not
    matter.

    Raises:
        RunError: a line that is to be kept cannot be read.
        OSError: the file cannot be written.
    """
    lines = list(read_log_lines(path))
    kept: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        done = kept[-1]["step"] if kept else 0
        if isinstance(line, dict) and type(line.get("step")) is int:
            if line["step"] <= step:
                kept.append(line)
        elif done < step and number < len(lines):
            reason = f"not JSON: {line}" if isinstance(line, ValueError) else "without a step"
            raise RunError(f"{path}, line {number}, is {reason}; remove the line to resume")
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in MiB: allocated by torch on a CUDA device, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
