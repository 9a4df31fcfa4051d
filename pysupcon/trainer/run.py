"""Read a finished run: config, data, trained model, log. Does not need accelerate or the training loop."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pysupcon.config import Config, load_config
from pysupcon.data.datamodule import DataModule, EvaluationDataset, load_data
from pysupcon.errors import RunError
from pysupcon.models.initial import WEIGHTS_FILE
from pysupcon.models.model import ContrastiveModel
from pysupcon.reading import one_line, parse_json, read_bytes, read_json
from pysupcon.trainer.data_record import check_same_samples

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
SKIPPED_FILE = "skipped_files.json"
"""Image files that ``data.on_error`` skip left out, with the reasons."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        dir: folder of the run.
        config: the resolved config of the training.
        module: a module like the one that was passed to ``pysupcon.train.run``; else None.
        dataset: the data set that was passed to ``pysupcon.train.run``; else None.
    """

    dir: Path
    config: Config
    module: torch.nn.Module | None = None
    dataset: Any = None

    @cached_property
    def data(self) -> DataModule:
        """The data with the splits of the training.

        Raises:
            RunError: the samples are not those of the training, which would change the splits.
        """
        check_same_samples(self._data_of_now, self.dir)
        return self._data_of_now

    @property
    def data_of_model(self) -> DataModule:
        """The data for uses that need no samples: shape of the input, classes, normalisation.

        Samples that were added or removed are no error here, except for vectors, which are normalised by the
        statistics of the training samples.
        """
        return self._data_of_now if self._data_of_now.image_size else self.data

    @cached_property
    def _data_of_now(self) -> DataModule:
        skips = self.config.data.on_error == "skip"
        return load_data(self.config.data, self.dataset, read_skipped(self.dir) if skips else None)

    @cached_property
    def model(self) -> ContrastiveModel:
        """The trained model on the CPU in eval mode; ``model.backbone(images)`` returns embeddings [B, E].

        Raises:
            RunError: the weights are missing, truncated or of another model; the message names the file.
        """
        config = replace(self.config, model=self.config.model.without_initial_weights())
        model = build_model(config, self.data_of_model, deepcopy(self.module))
        load_weights(model, self.dir / WEIGHTS_FILE)
        return model.eval()

    def weights_digest(self) -> str:
        """SHA-256 of the file of the trained weights, in hexadecimal digits.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        return hashlib.sha256((self.dir / WEIGHTS_FILE).read_bytes()).hexdigest()

    def splits(self) -> dict[str, EvaluationDataset]:
        """Return the splits "train", "val" and "test" without augmentation.

        Their items are (image float32 [C, S, S], coarse label, fine label).
        """
        return {name: self.data.evaluation_dataset(name) for name in self.data.splits}

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of ``log.jsonl``, one per step, in order.

        Raises:
            RunError: there is no log, or a line is not JSON; the message names the file and the line.
        """
        return read_log(self.dir / LOG_FILE)


def load_run(run_dir: str | Path, *, dataset: Any = None, model: torch.nn.Module | None = None) -> Run:
    """Open a run. The model and the data are read at their first use.

    Args:
        run_dir: folder of the run.
        dataset: if the run was trained by ``pysupcon.train.run(..., dataset=DATASET)``: the same data set.
        model: if the run was trained by ``pysupcon.train.run(..., model=MODULE)``: a module of the same
            architecture. The weights of the run are loaded into a copy.

    Raises:
        RunError: the folder holds no run.
        ConfigError: the run's config is not valid.
    """
    run_dir = Path(run_dir)
    if not os.path.isfile(run_dir / CONFIG_FILE):
        raise RunError(f"{run_dir} holds no run: there is no {CONFIG_FILE} in it")
    return Run(run_dir, load_config(run_dir / CONFIG_FILE), model, dataset)


def open_run(run: Run | str | Path) -> Run:
    """Return ``run`` itself, or open the run in the folder ``run``.

    Raises:
        RunError: the folder does not exist or holds no run.
        ConfigError: the run's config is not valid.
    """
    if not isinstance(run, (str, Path)):
        return run
    if not os.path.isdir(run):  # Path.is_dir raises an error for long names
        raise RunError(f"{run} must be the folder of a run, but there is no such folder")
    return load_run(run)


def build_model(config: Config, data: DataModule, module: torch.nn.Module | None = None) -> ContrastiveModel:
    """Build the untrained model of a config for its data.

    Args:
        config: the config.
        data: its data.
        module: the backbone, if it was passed to ``pysupcon.train.run``.
    """
    return ContrastiveModel(
        config.model, channels=data.channels, image_size=data.image_size, classes=len(data.class_names),
        module=module,
    )  # fmt: skip


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``.

    Raises:
        RunError: the file is missing, truncated or of another model; the message names the file.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing: the run has not finished, or is no run")
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise RunError(f"{path} is truncated or not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise RunError(f"{path} holds the weights of another model: {one_line(error)}") from error


def read_skipped(run_dir: Path) -> dict[str, str]:
    """Read the names of the image files that a run with ``data.on_error`` skip leaves out, with the reasons.

    Raises:
        RunError: there is no such file, or it is malformed; the message names it.
    """
    path = run_dir / SKIPPED_FILE
    if not os.path.isfile(path):
        raise RunError(
            f"{path} is missing: a training that starts with data.on_error=skip writes it, and its "
            "resumption and evaluation need it; data.on_error cannot be changed after the start"
        )
    try:
        found = read_json(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(reason, str) for reason in found.values()):
        raise RunError(f"{path} must hold a JSON object of file names and reasons, got {found!r:.60}")
    return found


def pack_skipped(skipped: Mapping[str, str]) -> bytes:
    """The content of the file that :func:`read_skipped` reads."""
    return (json.dumps(dict(skipped), indent=1) + "\n").encode()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a JSONL file.

    Raises:
        RunError: the file is missing or a line is not a JSON object; the message names the file and the line.
    """
    lines = []
    for number, line in enumerate(read_log_lines(path), 1):
        if isinstance(line, ValueError):
            raise RunError(f"{path}, line {number}, is not JSON: {line}") from line
        lines.append(line)
    return lines


def read_log_lines(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Yield each line of a JSONL file, or the error of a line that is not a JSON object in UTF-8.

    Raises:
        RunError: the file is missing or cannot be read; the message names it.
    """
    if not os.path.isfile(path):
        raise RunError(f"{path} is missing")
    try:
        content = read_bytes(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    for line in content.splitlines():
        try:
            values = parse_json(line)
            yield values if isinstance(values, dict) else ValueError(f"it holds {values!r:.60}")
        except ValueError as error:
            yield error
