"""Coarse-to-fine transfer (Thanos, arXiv 2204.07596): fine labels from an encoder trained on coarse ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysupcon.evaluators.base import FeatureSplits, Level, Result, accuracy_results
from pysupcon.evaluators.linear_probe import (
    CHOICE_MEANINGS,
    AugmentedProbeConfig,
    FittedProbe,
    fit_probe,
)


@dataclass
class CoarseToFineConfig(AugmentedProbeConfig):
    """Linear probes on the fine and the coarse labels of an encoder trained on coarse labels."""


def predict_restricted(probe: FittedProbe, features: Tensor, allowed: Tensor) -> Tensor:
    """Predicted labels [N] among the probe's C classes that ``allowed`` [N, C] bool permits."""
    scores = probe.logits(features).masked_fill(~allowed, -torch.inf)
    return probe.classes[scores.argmax(dim=1)]


class CoarseToFine:
    """Yields, under ``coarse_to_fine/``:

    - ``fine/accuracy``: a probe on the fine labels, which were not used for training;
    - ``coarse/accuracy``: a probe on the coarse labels;
    - ``fine_within_coarse/accuracy``: the fine probe restricted to the true coarse class. For a collapsed
      class this is the share of its largest subclass, whatever the coarse accuracy;
    - ``fine_within_coarse/chance``: the same for the most frequent training subclass of the coarse class;
    - ``{fine,coarse}/chance``: accuracy of the most frequent training class;
    - ``{fine,coarse}/{val_accuracy,chosen,converged}``: how each classifier was chosen.

    Labels of one level (every coarse class is one fine class) give the results of ``fine`` only.
    """

    name: ClassVar[str] = "coarse_to_fine"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "chance": "fraction",
        "val_accuracy": "fraction",
        "chosen": "penalty or learning rate",
        "converged": "1 or 0",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "fine/accuracy": "linear probe on the fine labels",
        "coarse/accuracy": "linear probe on the coarse labels",
        "fine_within_coarse/accuracy": "the fine probe, if it knows the coarse class",
        "fine_within_coarse/chance": "always the most frequent fine class of the coarse class",
        **CHOICE_MEANINGS,
    }
    headline: ClassVar[Sequence[str]] = ("fine/accuracy", "coarse/accuracy")

    def __init__(self, config: CoarseToFineConfig | None = None) -> None:
        self.config = config or CoarseToFineConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        train, test, config = splits.train, splits.test, self.config
        augmented = splits.augmented_passes(config.augmented_passes)
        probes: dict[Level, FittedProbe] = {}
        for level in splits.levels:
            probes[level] = fit_probe(
                train, splits.val, level, config, augmented=augmented, progress=progress
            )
            probe, truth = probes[level], test.labels(level).cpu()
            prefix = f"coarse_to_fine/{level}"
            yield from accuracy_results(prefix, probe.predict(test.features), truth)
            values, counts = train.labels(level).cpu().unique(return_counts=True)
            yield f"{prefix}/chance", (truth == values[counts.argmax()]).double().mean().item()
            yield f"{prefix}/val_accuracy", probe.val_accuracy
            yield f"{prefix}/chosen", probe.chosen
            yield f"{prefix}/converged", float(probe.converged)
        if "coarse" not in probes:
            return

        probe, coarse, fine = probes["fine"], test.coarse.cpu(), test.fine.cpu()
        counts = self._fine_class_counts(train.coarse.cpu(), train.fine.cpu(), coarse, probe.classes)
        prefix = "coarse_to_fine/fine_within_coarse"
        predicted = predict_restricted(probe, test.features, counts > 0)
        yield from accuracy_results(prefix, predicted, fine)
        yield f"{prefix}/chance", (probe.classes[counts.argmax(dim=1)] == fine).double().mean().item()

    @staticmethod
    def _fine_class_counts(
        train_coarse: Tensor, train_fine: Tensor, coarse: Tensor, classes: Tensor
    ) -> Tensor:
        """Training samples of each fine class in the coarse class of each test sample, [M, C] int64."""
        coarse_values, coarse_index = torch.cat([train_coarse, coarse]).unique(return_inverse=True)
        table = torch.zeros(len(coarse_values), len(classes), dtype=torch.int64)
        fine_index = torch.searchsorted(classes, train_fine)
        ones = torch.ones_like(fine_index)
        table.index_put_((coarse_index[: len(train_coarse)], fine_index), ones, accumulate=True)
        return table[coarse_index[len(train_coarse) :]]
