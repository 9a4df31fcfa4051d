"""Transfer to another data set (protocol of SINCERE, arXiv 2309.14277): the frozen encoder, a new linear
head.

The penalty or the learning rate is chosen on the validation split, a stratified tenth of the training
samples, then the head is trained once more on all training samples with that choice. To follow the paper to
the letter: ``solver="sgd"`` and ``learning_rates`` of one's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pysupcon.evaluators.base import FeatureSet, FeatureSplits, Result, accuracy_results
from pysupcon.evaluators.linear_probe import FittedProbe, ProbeConfig, fit_probe


@dataclass
class TransferConfig(ProbeConfig):
    """The linear head of the other data set."""

    refit: bool = True
    """Train once more on training and validation samples together with what validation chose."""


def concatenate(first: FeatureSet, second: FeatureSet) -> FeatureSet:
    """The samples of both."""
    return FeatureSet(
        torch.cat([first.features, second.features]),
        torch.cat([first.coarse, second.coarse]),
        torch.cat([first.fine, second.fine]),
    )


def fit_transfer_head(
    splits: FeatureSplits, config: TransferConfig, *, progress: bool = False
) -> FittedProbe:
    """The head, with the ``val_accuracy`` and the ``chosen`` of before the last training, whose last epoch
    counts: nothing is left to choose an epoch by."""
    chosen = fit_probe(splits.train, splits.val, "fine", config, progress=progress)
    if not config.refit or chosen.chosen == 0:  # 0: one class only, nothing was chosen
        return chosen
    only = replace(config, penalties=[chosen.chosen], learning_rates=[chosen.chosen])
    both = concatenate(splits.train, splits.val)
    # A class that no head knows is wrong after every epoch, and of equally good ones the last is kept.
    unknown = both.fine.max().expand(1) + 1
    nothing = FeatureSet(both.features[:1], both.coarse[:1], unknown)
    last = fit_probe(both, nothing, "fine", only, progress=progress)
    return last._replace(val_accuracy=chosen.val_accuracy)


class Transfer:
    """Yields ``transfer/accuracy`` on the fine labels of the other data set's test split, its outcomes, and
    how the head was chosen: ``val_accuracy``, ``chosen``, ``converged``. ``chance`` is its most frequent
    class."""

    name: ClassVar[str] = "transfer"
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "fraction",
        "chance": "fraction",
        "val_accuracy": "fraction",
        "chosen": "penalty or learning rate",
        "converged": "1 or 0",
    }

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
