"""What the main process writes during a training: log, summary, and the lines and the bar in the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pysupcon.config import Config, to_yaml
from pysupcon.errors import RunError
from pysupcon.trainer import provenance, summary
from pysupcon.trainer.diagnosis import Diagnosis
from pysupcon.trainer.files import replace_file
from pysupcon.trainer.log import StepLog
from pysupcon.trainer.progress import print_line
from pysupcon.trainer.run import CONFIG_FILE, LOG_FILE
from pysupcon.trainer.summary import EpochSummary

INTERVAL = 30.0
"""Seconds between two lines of progress if stderr is no terminal, where a bar would fill the log."""


class TrainingReport:
    """Context manager that writes log.jsonl, summary.csv, config.yaml and environment.json, and prints.

    Args:
        config: resolved config.
        run_dir: folder of the run.
        done, steps: number of finished steps, and of all steps.
        steps_per_epoch: optimizer steps per epoch.
        processes: number of processes.
        device: device of the main process.
        told: faults that the user has been told of, see :class:`pysupcon.trainer.diagnosis.Diagnosis`.

    Raises:
        RunError: a file cannot be written.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        done: int,
        steps: int,
        steps_per_epoch: int,
        processes: int,
        device: torch.device,
        told: Iterable[str] = (),
    ) -> None:
        self._steps, self._epochs = steps, math.ceil(steps / steps_per_epoch)
        try:
            self._log = StepLog(run_dir / LOG_FILE, done)
            replace_file(run_dir / CONFIG_FILE, to_yaml(config).encode())
            provenance.record_start(run_dir, step=done, processes=processes, device=device)
        except OSError as error:
            raise RunError(f"{run_dir} cannot be written to: {error}") from error
        self._summary = EpochSummary(run_dir / summary.FILE, self._log.earlier, steps_per_epoch)
        self._diagnosis = Diagnosis(steps_per_epoch, config.optimizer.warmup_epochs, done, told)
        self._bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=None)
        self._printed = time.monotonic()

    def __enter__(self) -> TrainingReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log.close()

    @property
    def failed(self) -> bool:
        """Whether the log could not be written; :meth:`sync` raises the error."""
        return self._log.failure is not None

    def add(self, line: dict[str, Any], *, last: bool) -> None:
        """Write and show a line of the log.

        Args:
            line: the values of a step.
            last: the training ends after this step.
        """
        self._log.write(line)
        row = self._summary.add(line, last=last)
        progress = f"loss {line['loss']:.3f}, {line['images_per_second']:,.0f} images/s"
        self._bar.update()
        self._bar.set_postfix_str(progress, refresh=False)
        due = self._bar.disable and time.monotonic() - self._printed > INTERVAL
        if row is not None:
            print_line(summary.describe(row, self._epochs))
        elif due:
            print_line(f"step {line['step']}/{self._steps}: {progress}")
        if row is not None or due:
            self._printed = time.monotonic()
        for message in self._diagnosis.add(line):
            print_line(message)

    def sync(self) -> None:
        """Write log and summary to disk.

        Raises:
            RunError: a file could not be written.
        """
        self._log.sync()
        self._summary.write()
