"""Coarse-to-fine transfer (Thanos, arXiv 2204.07596): does an encoder trained on classes know their parts?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysupcon.evaluators.base import FeatureSplits, Level, Result, accuracy_results
from pysupcon.evaluators.linear_probe import FittedProbe, ProbeConfig, fit_probe


@dataclass
class CoarseToFineConfig(ProbeConfig):
    """Linear probes of an encoder trained on coarse labels: on the fine labels and on the coarse ones."""


def predict_restricted(probe: FittedProbe, features: Tensor, allowed: Tensor) -> Tensor:
    """Predicted label [N] among those that ``allowed`` [N, C] bool permits, C the probe's classes."""
    scores = probe.logits(features).masked_fill(~allowed, -torch.inf)
    return probe.classes[scores.argmax(dim=1)]


class CoarseToFine:
    """Yields, under ``coarse_to_fine/``:

    - ``fine/accuracy``: the transfer, a probe on the labels the encoder has not seen;
    - ``coarse/accuracy``: a probe on those it was trained on;
    - ``fine_within_coarse/accuracy``: the fine probe when told the true coarse class, so that it can only
      confuse the parts of one class. A collapsed class gives its majority here, however good the coarse
      accuracy is;
    - ``fine_within_coarse/chance``: the same when always the most frequent (in training) part is said;
    - ``{fine,coarse}/chance``: always the most frequent class of the training split;
    - ``{fine,coarse}/{val_accuracy,chosen,converged}``: how each classifier was chosen.
    """

    name: ClassVar[str] = "coarse_to_fine"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "chance": "fraction",
        "val_accuracy": "fraction",
        "chosen": "penalty or learning rate",
        "converged": "1 or 0",
    }

    def __init__(self, config: CoarseToFineConfig | None = None) -> None:
        self.config = config or CoarseToFineConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        train, test, config = splits.train, splits.test, self.config
        levels: tuple[Level, ...] = ("fine", "coarse")
        one_level = all(torch.equal(split.fine, split.coarse) for _, split in splits.items())
        probes: dict[Level, FittedProbe] = {}
        for level in levels:
            if level == "coarse" and one_level:
                probes[level] = probes["fine"]
            else:
                probes[level] = fit_probe(train, splits.val, level, config, progress=progress)
            probe, truth = probes[level], test.labels(level).cpu()
            prefix = f"coarse_to_fine/{level}"
            yield from accuracy_results(prefix, probe.predict(test.features), truth)
            values, counts = train.labels(level).cpu().unique(return_counts=True)
            yield f"{prefix}/chance", (truth == values[counts.argmax()]).double().mean().item()
            yield f"{prefix}/val_accuracy", probe.val_accuracy
            yield f"{prefix}/chosen", probe.chosen
            yield f"{prefix}/converged", float(probe.converged)

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
        """[M, C]: how many training samples of each fine class share the coarse class of each test sample."""
        coarse_values, coarse_index = torch.cat([train_coarse, coarse]).unique(return_inverse=True)
        table = torch.zeros(len(coarse_values), len(classes), dtype=torch.int64)
        fine_index = torch.searchsorted(classes, train_fine)
        ones = torch.ones_like(fine_index)
        table.index_put_((coarse_index[: len(train_coarse)], fine_index), ones, accumulate=True)
        return table[coarse_index[len(train_coarse) :]]
