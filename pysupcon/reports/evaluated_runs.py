"""Read evaluated runs from disk and group the runs that differ only in the seed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysupcon.errors import RunError
from pysupcon.reading import one_line, read_json, read_yaml

__all__ = [
    "EVALUATION",
    "EVALUATIONS",
    "Configuration",
    "EvaluatedRun",
    "check_same_test_set",
    "config_key",
    "configurations",
    "read_run",
]

EVALUATION = "evaluation"
EVALUATIONS = {"embedding": EVALUATION, "projection": f"{EVALUATION}-projection"}
"""Subfolders of a run's evaluations by ``evaluation.features``"""
_SEED_FIELDS = ("seed", "output_dir", "resume_from_checkpoint", "evaluate", "evaluation")
"""Fields of the config in which runs of one configuration may differ."""
_TEST_FIELDS = ("dataset", "root", "test_fraction", "split_seed")
"""Fields that determine the test samples."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with the results of its evaluation.

    Attributes:
        dir: folder of the run.
        config: config of the run as plain values.
        outcomes: results per test sample by name, [N_test] each.
        figures: names of all metrics.
        part: subfolder of the results.
        settings: arguments of each evaluator by its name, in nested dicts; empty for runs of older versions.
    """

    dir: Path
    config: dict[str, Any]
    outcomes: dict[str, Tensor]
    figures: list[str]
    part: str = EVALUATION
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.dir.resolve().name

    @property
    def of_head(self) -> bool:
        """Whether the projection head's outputs were evaluated, not the embeddings."""
        return self.part == EVALUATIONS["projection"]

    @property
    def seed(self) -> int:
        """Seed of the training.

        Raises:
            RunError: the config has none, or it is no integer.
        """
        seed = self.config.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise RunError(f"{self.dir / 'config.yaml'}: seed must be an integer, got {seed!r}")
        return seed


def read_run(folder: str | Path, part: str = EVALUATION) -> EvaluatedRun:
    """Read RUN/config.yaml and the results in RUN/PART.

    Args:
        folder: folder of the run; or that of one of its evaluations, e.g. RUN/evaluation-projection, which is
            PART then.
        part: "evaluation", "evaluation-projection", or "transfer/NAME" for the transfer to another data set.

    Raises:
        RunError: a file is missing or damaged; the message names it and the command that writes it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_dir raises an error for long names
        raise RunError(f"{folder} must be the folder of a run, but there is no such folder")
    if folder.name in EVALUATIONS.values() and not (folder / "config.yaml").exists():
        folder, part = folder.parent, folder.name
    outcomes = folder / part / "outcomes.safetensors"
    metrics = folder / part / "metrics.json"
    command, _, dataset = part.partition("/")
    written_by = f"{command} {folder} --data.dataset {dataset}"
    for features, name in EVALUATIONS.items():
        if part == name:
            written_by = f"evaluate {folder} --features {features}"
    for path in (outcomes, metrics):
        if not os.path.isfile(path):
            raise RunError(f"{path} is missing: run `python -m pysupcon {written_by}` first")
    try:
        config = read_yaml(folder / "config.yaml")
    except ValueError as error:
        raise RunError(f"{folder / 'config.yaml'} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("data", {}), dict):
        raise RunError(f"{folder / 'config.yaml'} must hold the config of a run, a mapping of sections")
    try:
        config_key(config)
    except TypeError as error:
        raise RunError(f"{folder / 'config.yaml'} must hold the config of a run: {error}") from error
    try:
        tensors = load_file(outcomes)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{outcomes} is truncated or not a safetensors file: {one_line(error)}") from error
    try:
        report = read_json(metrics)
        figures = list(report["metrics"].keys())
        settings = _settings(report.get("metadata", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{metrics} is not a report: {one_line(error)}") from error
    for label in ("labels/fine", "labels/coarse"):
        if label not in tensors:
            raise RunError(f"{outcomes} holds no {label}: evaluate {folder} again")
    samples = tensors["labels/fine"].shape
    for name, values in tensors.items():
        if values.shape != samples or values.ndim != 1 or not len(values):
            raise RunError(
                f"{outcomes} must hold one number for each test sample, but {name} is of shape "
                f"{list(values.shape)} and labels/fine of shape {list(samples)}: evaluate {folder} again"
            )
    return EvaluatedRun(folder, config, tensors, figures, part, settings)


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the evaluators: those of the last evaluation, of kept results, or of a transfer."""
    arguments = metadata.get("arguments", {})
    if "probe" in arguments:
        return {"transfer": arguments["probe"]}
    kept = {name: known.get("arguments", {}) for name, known in metadata.get("kept", {}).items()}
    return {**arguments, **kept}


def check_same_test_set(runs: Sequence[EvaluatedRun]) -> None:
    """Check that all runs have the same test samples, so that their outcomes can be paired.

    Raises:
        RunError: two runs differ; the message names them and the difference.
    """
    first = runs[0]
    for run in runs[1:]:
        mine, other = first.config.get("data", {}), run.config.get("data", {})
        # The config describes the training data; a transfer is tested on other data.
        for name in _TEST_FIELDS if run.part in EVALUATIONS.values() else ():
            if mine.get(name) != other.get(name):
                raise RunError(
                    f"the runs must be tested on the same samples, but data.{name} is {mine.get(name)!r} in "
                    f"{first.dir} and {other.get(name)!r} in {run.dir}"
                )
        for label in ("labels/fine", "labels/coarse"):
            a, b = first.outcomes[label], run.outcomes[label]
            if a.shape != b.shape:
                raise RunError(
                    f"the runs must be tested on the same samples, but {first.dir} has {len(a)} of them and "
                    f"{run.dir} has {len(b)}"
                )
            if not torch.equal(a, b):
                raise RunError(
                    f"the runs must be tested on the same samples, but {label} of {first.dir} and of "
                    f"{run.dir} differ in {int((a != b).sum())} of {len(a)} samples"
                )


def config_key(config: dict[str, Any]) -> str:
    """Return a key that is equal for runs which differ only in the seed or in the evaluation."""
    plain = json.loads(json.dumps(config, default=str))
    for name in _SEED_FIELDS:
        plain.pop(name, None)
    return json.dumps(plain, sort_keys=True)


@dataclass(frozen=True)
class Configuration:
    """Runs of one config with different seeds."""

    name: str
    runs: list[EvaluatedRun]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run.seed for run in self.runs]


def configurations(runs: Sequence[EvaluatedRun]) -> list[Configuration]:
    """Group the runs by config and evaluated features, in order of first occurrence, named by the common
    prefix of their folders; "(projection)" marks those of the projection head."""
    by_key: dict[tuple[str, bool], list[EvaluatedRun]] = {}
    for run in runs:
        by_key.setdefault((config_key(run.config), run.of_head), []).append(run)
    found: list[Configuration] = []
    for members in by_key.values():
        name = members[0].name
        if len(members) > 1:
            letters = zip(*(run.name for run in members), strict=False)
            shared = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, letters))
            name = re.sub(r"[-_. ]*(seed|s)?[-_=. ]*\d*$", "", shared) or name
        name += " (projection)" if members[0].of_head else ""
        taken = {configuration.name for configuration in found}
        rank = 2
        while name in taken:
            name, rank = f"{name.removesuffix(f' ({rank - 1})')} ({rank})", rank + 1
        found.append(Configuration(name, members))
    return found
