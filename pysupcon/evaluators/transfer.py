"""Transfer to another data set: a new linear head on the frozen encoder (SINCERE, arXiv 2309.14277).

The validation split, a stratified tenth of the training samples, selects the penalty or learning rate. The
head is then trained again on all training samples. The paper uses ``solver="sgd"`` with a sweep of
``learning_rates``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pysupcon.evaluators.base import FeatureSet, FeatureSplits, Result, accuracy_results
from pysupcon.evaluators.linear_probe import CHOICE_MEANINGS, FittedProbe, ProbeConfig, fit_probe


@dataclass
class TransferConfig(ProbeConfig):
    """The linear head for the other data set."""

    refit: bool = True
    """Train again on training and validation samples with the selected hyperparameter."""


def concatenate(first: FeatureSet, second: FeatureSet) -> FeatureSet:
    """Concatenate the samples of two feature sets."""
    return FeatureSet(
        torch.cat([first.features, second.features]),
        torch.cat([first.coarse, second.coarse]),
        torch.cat([first.fine, second.fine]),
    )


def fit_transfer_head(
    splits: FeatureSplits, config: TransferConfig, *, progress: bool = False
) -> FittedProbe:
    """Fit the head; with ``refit``, ``val_accuracy`` is that of the selection.

    No samples are left to select an epoch of the final training, so its last epoch is used.
    """
    chosen = fit_probe(splits.train, splits.val, "fine", config, progress=progress)
    if not config.refit or chosen.chosen == 0:  # 0: only one class
        return chosen
    only = replace(config, penalties=[chosen.chosen], learning_rates=[chosen.chosen])
    both = concatenate(splits.train, splits.val)
    # A validation class unknown to the head gives accuracy 0 in every epoch, and a tie keeps the last epoch.
    unknown = both.fine.max().expand(1) + 1
    unknown_sample = FeatureSet(both.features[:1], both.coarse[:1], unknown)
    last = fit_probe(both, unknown_sample, "fine", only, progress=progress)
    return last._replace(val_accuracy=chosen.val_accuracy)


class Transfer:
    """Yields ``transfer/accuracy`` on the fine labels of the other data set's test split, and its outcomes.

    ``val_accuracy``, ``chosen`` and ``converged`` describe how the head was chosen. ``chance`` is the
    accuracy of the most frequent training class.
    """

    name: ClassVar[str] = "transfer"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "chance": "fraction",
        "val_accuracy": "fraction",
        "chosen": "penalty or learning rate",
        "converged": "1 or 0",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "accuracy": "linear head on the frozen encoder, fine labels of the other data set",
        **CHOICE_MEANINGS,
    }
    headline: ClassVar[Sequence[str]] = ("accuracy", "chance")

    def __init__(self, config: TransferConfig | None = None) -> None:
        self.config = config or TransferConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        probe = fit_transfer_head(splits, self.config, progress=progress)
        truth = splits.test.fine.cpu()
        yield from accuracy_results("transfer", probe.predict(splits.test.features), truth)
        values, counts = splits.train.fine.cpu().unique(return_counts=True)
        yield "transfer/chance", (truth == values[counts.argmax()]).double().mean().item()
        yield "transfer/val_accuracy", probe.val_accuracy
        yield "transfer/chosen", probe.chosen
        yield "transfer/converged", float(probe.converged)
