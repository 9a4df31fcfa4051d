"""Results of an earlier evaluation of the same run, kept when other evaluators run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysupcon.evaluators import BootstrapConfig, with_intervals
from pysupcon.reading import read_bytes
from pysupcon.reports.report import Metric, Report

LABELS = ("labels/fine", "labels/coarse")
_SETTINGS = ("device", "threads", "machine", "versions")


@dataclass(frozen=True)
class Earlier:
    """A complete evaluation.

    Attributes:
        report: its report.
        outcomes: results per test sample by name, and the labels.
        order: names of the evaluators before some were left out.
    """

    report: Report
    outcomes: dict[str, Tensor]
    order: list[str] = field(default_factory=list)

    def fits(self, weights: str, features: str, labels: Mapping[str, Tensor]) -> bool:
        """Whether it is of these weights (SHA-256), features (as the report names them) and test labels."""
        metadata = self.report.metadata
        same = (metadata.get("weights_sha256"), metadata.get("features")) == (weights, features)
        return same and all(
            name in self.outcomes and torch.equal(self.outcomes[name], labels[name]) for name in LABELS
        )

    def without(self, evaluators: Iterable[str]) -> Earlier:
        """The results of all evaluators but these."""
        replaced = set(evaluators)

        def stays(name: str) -> bool:
            return name.partition("/")[0] not in replaced

        metrics = {name: metric for name, metric in self.report.metrics.items() if stays(name)}
        outcomes = {name: outcome for name, outcome in self.outcomes.items() if stays(name)}
        old = self.report
        report = Report(old.title, metrics, old.metadata, confidence=old.confidence, notes=old.notes)
        return Earlier(report, outcomes, self.order or self.evaluators)

    @property
    def evaluators(self) -> list[str]:
        """Names of the evaluators, in order."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.report.metrics))

    @property
    def notes(self) -> list[str]:
        """The notes about these evaluators."""
        return [note for note in self.report.notes if note.partition(":")[0] in self.evaluators]

    def metrics(self, bootstrap: BootstrapConfig) -> dict[str, Metric]:
        """The metrics; those of outcomes get the intervals of ``bootstrap``."""
        values = ((name, metric.value) for name, metric in self.report.metrics.items())
        results = with_intervals([*values, *self.outcomes.items()], bootstrap)
        ends = {name: float(value) for name, value in results if name.endswith(("/low", "/high"))}
        return {
            name: Metric(metric.value, metric.unit, ends[f"{name}/low"], ends[f"{name}/high"], metric.meaning)
            if f"{name}/low" in ends
            else metric
            if self.report.confidence == bootstrap.confidence
            else replace(metric, low=None, high=None)  # an interval of the user's evaluator
            for name, metric in self.report.metrics.items()
        }

    def settings(self) -> dict[str, Any]:
        """Device, versions and arguments of each evaluator by its name."""
        metadata = self.report.metadata
        arguments = metadata.get("arguments", {})
        shared = {name: metadata.get(name) for name in _SETTINGS}
        own = {name: shared | {"arguments": arguments.get(name, {})} for name in self.evaluators}
        return own | {
            name: known for name, known in metadata.get("kept", {}).items() if name in self.evaluators
        }


def read_earlier(folder: Path, metrics_file: str, outcomes_file: str) -> Earlier | None:
    """Read the evaluation in ``folder``; None if there is none, or its files do not belong together."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        text = read_bytes(folder / metrics_file)
        report = Report.from_json(text.decode())
        content = (folder / outcomes_file).read_bytes()
        if report.metadata.get("outcomes_sha256") != hashlib.sha256(content).hexdigest():
            return None
        return Earlier(report, load(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def free_folder(folder: Path) -> Path:
    """The first of FOLDER-1, FOLDER-2, ... that does not exist."""
    return next(
        path for number in count(1) if not (path := folder.with_name(f"{folder.name}-{number}")).exists()
    )
