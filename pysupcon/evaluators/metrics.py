"""Metrics of a test set that are functions of one outcome per sample, so that they can be resampled.

Names define which metric belongs to which outcomes: ``X/accuracy`` to ``X/correct``, ``X/margin`` to
    ``X/target``
and ``X/noise``. ``X/class=3/accuracy`` uses the samples of ``X/correct`` whose ``X/class`` is 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.evaluators.base import Result


def roc_auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve, [...] fp64.

    The probability that a draw from ``positive`` [..., P] exceeds one from ``negative`` [..., Q]; a tie
    counts half.
    """
    ordered = negative.sort(dim=-1).values
    below = torch.searchsorted(ordered, positive.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).double().mean(dim=-1) / (2 * negative.shape[-1])


def average_precision(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the precision-recall curve, [...] fp64: mean precision at the scores of the positives.

    Args:
        positive, negative: scores [..., P] and [..., Q]; equal scores form one threshold.
    """
    positive = positive.sort(dim=-1).values
    negative = negative.sort(dim=-1).values
    found = positive.shape[-1] - torch.searchsorted(positive, positive, right=False)
    wrong = negative.shape[-1] - torch.searchsorted(negative, positive, right=False)
    return (found.double() / (found + wrong)).mean(dim=-1)


def median(values: Tensor) -> Tensor:
    """Median over the last dimension, fp64; the mean of the middle two for an even number of values."""
    return values.double().quantile(0.5, dim=-1)


def margin(target: Tensor, noise: Tensor) -> Tensor:
    """|median(target) - median(noise)|, [..., N] each to [...]."""
    return (median(target) - median(noise)).abs()


def worst_group(correct: Tensor, group: Tensor) -> Tensor:
    """Lowest accuracy of a group, [..., N] each to [...]; groups without samples are ignored."""
    accuracies = []
    for label in group.unique():
        member = group == label
        count = member.sum(dim=-1)
        accuracy = (correct.bool() & member).sum(dim=-1).double() / count
        accuracies.append(torch.where(count > 0, accuracy, torch.inf))
    return torch.stack(accuracies).amin(dim=0)


def binary_auroc(score: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of ``score`` [R, N] for the labels ``positive`` [R, N] bool, [R] fp64.

    A row with samples of one label only gives 0.5.
    """
    half = torch.tensor(0.5, dtype=torch.float64)
    return torch.stack(
        [
            roc_auc(row[truth], row[~truth]) if 0 < int(truth.sum()) < len(truth) else half
            for row, truth in zip(score, positive, strict=True)
        ]
    )


def worst_group_auroc(score: Tensor, positive: Tensor, group: Tensor) -> Tensor:
    """Lowest area, over the groups, of a group's samples against all samples of the other class, [R] fp64.

    Every group lies within one class.
    """
    areas = []
    for label in group.unique():
        member = group == label
        other = positive != (positive & member).any()
        keep = member | other
        areas.append(
            torch.stack(
                [
                    binary_auroc(row[None, kept], truth[None, kept])[0]
                    for row, truth, kept in zip(score, positive, keep, strict=True)
                ]
            )
        )
    return torch.stack(areas).amin(dim=0)


class MetricDefinition(NamedTuple):
    """The names of a metric's outcomes, and the function of their tensors [R, N] to values [R] fp64.

    ``least``: it is the least of several values, which a sample of test samples makes too low.
    ``from_counts``: the same values, faster, from the number of draws of each test sample [R, N] float32 and
    the outcomes [N], if the first outcome is bool: sums of whole numbers below 2^24, which are exact.
    """

    outcomes: tuple[str, ...]
    compute: Callable[..., Tensor]
    least: bool = False
    from_counts: Callable[..., Tensor] | None = None


def _mean(values: Tensor) -> Tensor:
    return values.double().mean(dim=-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part.double().sum(dim=-1) / whole.double().sum(dim=-1).clamp(min=1)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values.double() * weight).sum(dim=-1) / weight.sum(dim=-1)


def _mean_from_counts(counts: Tensor, correct: Tensor) -> Tensor:
    return (counts @ correct.float()).double() / len(correct)


def _worst_group_from_counts(counts: Tensor, correct: Tensor, group: Tensor) -> Tensor:
    members = (group[:, None] == group.unique()).float()
    drawn = (counts @ members).double()
    right = (counts @ (members * correct[:, None])).double()
    return torch.where(drawn > 0, right / drawn, torch.inf).amin(dim=1)


#: By the last part of a metric's name.
METRICS: Mapping[str, MetricDefinition] = {
    "accuracy": MetricDefinition(("correct",), _mean, from_counts=_mean_from_counts),
    "adjusted_accuracy": MetricDefinition(("correct", "weight"), _weighted_mean),
    "worst_group_accuracy": MetricDefinition(
        ("correct", "group"), worst_group, least=True, from_counts=_worst_group_from_counts
    ),
    "auroc": MetricDefinition(("score", "positive"), binary_auroc),
    "worst_group_auroc": MetricDefinition(("score", "positive", "group"), worst_group_auroc, least=True),
    "target_median": MetricDefinition(("target",), median),
    "noise_median": MetricDefinition(("noise",), median),
    "margin": MetricDefinition(("target", "noise"), margin),
    "roc_auc": MetricDefinition(("target", "noise"), roc_auc),
    "average_precision": MetricDefinition(("target", "noise"), average_precision),
    "kl_bound": MetricDefinition(("bound",), _mean),
    "supcon_loss": MetricDefinition(("supcon",), _mean),
    "sincere_loss": MetricDefinition(("sincere",), _mean),
    "supcon_repelling": MetricDefinition(("supcon_repels", "positives"), _ratio),
    "sincere_repelling": MetricDefinition(("sincere_repels", "positives"), _ratio),
}

_SUBSET = re.compile(r"(class|group)=(-?\d+)")
OF_ONE_PART = re.compile(r"(^|/)(class|group)=")
"""Occurs in the names of metrics of one class or group."""


class BoundMetric(NamedTuple):
    """A metric with its outcomes, [N] each, N >= 1, without ignored samples."""

    definition: MetricDefinition
    outcomes: list[Tensor]

    def value(self) -> float:
        """The value of the metric."""
        return self.definition.compute(*(outcome[None] for outcome in self.outcomes)).item()


def bind_metric(name: str, outcomes: Mapping[str, Tensor]) -> BoundMetric | None:
    """Find the metric ``name`` and its ``outcomes`` ([N_test] each, by name); None if there is none.

    Samples with NaN in an outcome are ignored.
    """
    prefix, _, last = name.rpartition("/")
    definition = METRICS.get(last)
    if definition is None:
        return None
    head, _, part = prefix.rpartition("/")
    found = _SUBSET.fullmatch(part)
    names = [f"{head if found else prefix}/{outcome}" for outcome in definition.outcomes]
    members = f"{head}/{found[1]}" if found else None
    if any(needed not in outcomes for needed in (*names, *([members] if members else []))):
        return None
    tensors = [outcomes[needed] for needed in names]
    keep = torch.ones(len(tensors[0]), dtype=torch.bool)
    if found and members:
        keep &= outcomes[members] == int(found[2])
    for tensor in tensors:
        if tensor.is_floating_point():
            keep &= ~tensor.isnan()
    return BoundMetric(definition, [tensor[keep] for tensor in tensors]) if keep.any() else None


def metric_results(prefix: str, metrics: Iterable[str], outcomes: Mapping[str, Tensor]) -> Iterator[Result]:
    """Yield the named ``metrics`` of ``outcomes``, then the outcomes, all under ``prefix/``."""
    named = {f"{prefix}/{name}": outcome for name, outcome in outcomes.items()}
    for metric in metrics:
        found = bind_metric(f"{prefix}/{metric}", named)
        if found is None:
            raise ValueError(f"{prefix}/{metric} cannot be computed from the outcomes {sorted(outcomes)}")
        yield f"{prefix}/{metric}", found.value()
    yield from named.items()
