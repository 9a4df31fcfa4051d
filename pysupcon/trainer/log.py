"""The log of a run: one JSON line a step."""

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
from pysupcon.trainer.run import read_log


class StepLog:
    """Appends lines to ``log.jsonl``; every line is on its way to the file when :meth:`write` returns.

    The loop writes: step and epoch (done), loss and its parts (means over processes), gradient_norm (before
    clipping), temperature (if it is learnable: before the step), group=G/loss (of the last batch that held
    group G) and group=G/weight (GroupDRO), val_loss and its parts (at checkpoints), val_accuracy and
    val_worst_group (if trainer.best_by asks for groups),
    valid_anchors (of all processes: anchors that have a positive) and chance (the contrastive loss if all
    rows were one point) where there is a contrastive loss, learning_rate (of this step), images_per_second
    (views, of all processes), peak_memory_mib (of the main process).

    Args:
        path: of the file; created if missing.
        resumed_step: steps already done. Lines of later steps, from before an interruption, are dropped:
            these steps are done again.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        if path.exists():
            _drop_after(path, resumed_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            RunError: it could not be written.
        """
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._path} could not be written: {error.strerror or error}") from error

    def sync(self) -> None:
        """Have all lines on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what could not be written was said by write
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):  # the process died within a line
        text = text[: text.rfind("\n") + 1]
    kept = path.with_suffix(".kept")
    kept.write_text(text, encoding="utf-8")
    lines = [line for line in read_log(kept) if line["step"] <= step]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(kept, path)


def peak_memory(device: torch.device) -> float:
    """Greatest memory so far, MiB: allocated by torch on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
