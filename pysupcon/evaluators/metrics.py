"""Figures of a test set that are functions of one outcome per sample, so that they can be resampled.

Which figure follows from which outcomes is said by names alone: ``X/accuracy`` from ``X/correct``,
``X/margin`` from ``X/target`` and ``X/noise``; ``X/class=3/accuracy`` from those samples of ``X/correct``
whose ``X/class`` is 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.evaluators.base import Result


def roc_auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a draw from ``positive`` [..., P] exceeds one from ``negative`` [..., Q], [...] fp64.

    A tie counts half. It is the area under the ROC curve.
    """
    ordered = negative.sort(dim=-1).values
    below = torch.searchsorted(ordered, positive.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).double().mean(dim=-1) / (2 * negative.shape[-1])


def average_precision(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean over the positives of the precision at their score, [...] fp64: the area under the PR curve.

    Args:
        positive, negative: scores [..., P] and [..., Q]; equal scores are one threshold.
    """
    positive = positive.sort(dim=-1).values
    negative = negative.sort(dim=-1).values
    found = positive.shape[-1] - torch.searchsorted(positive, positive, right=False)
    wrong = negative.shape[-1] - torch.searchsorted(negative, positive, right=False)
    return (found.double() / (found + wrong)).mean(dim=-1)


def median(values: Tensor) -> Tensor:
    """[..., N] to [...] fp64; of an even number of values the mean of the middle two."""
    return values.double().quantile(0.5, dim=-1)


def margin(target: Tensor, noise: Tensor) -> Tensor:
    """|median(target) - median(noise)|, [..., N] each to [...]."""
    return (median(target) - median(noise)).abs()


def worst_group(correct: Tensor, group: Tensor) -> Tensor:
    """Accuracy of the group that has the lowest, [..., N] each to [...]; a group without samples is left
    out."""
    accuracies = []
    for label in group.unique():
        member = group == label
        count = member.sum(dim=-1)
        accuracy = (correct.bool() & member).sum(dim=-1).double() / count
        accuracies.append(torch.where(count > 0, accuracy, torch.inf))
    return torch.stack(accuracies).amin(dim=0)


def binary_auroc(score: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of ``score`` [R, N] for telling where ``positive`` [R, N] bool, [R] fp64.

    A row that lacks one of the two gives 0.5.
    """
    half = torch.tensor(0.5, dtype=torch.float64)
    return torch.stack(
        [
            roc_auc(row[truth], row[~truth]) if 0 < int(truth.sum()) < len(truth) else half
            for row, truth in zip(score, positive, strict=True)
        ]
    )


def worst_group_auroc(score: Tensor, positive: Tensor, group: Tensor) -> Tensor:
    """The lowest, over the groups, of the area for a group's samples against all those of the other class,
    [R].

    A group lies within one class.
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


class Metric(NamedTuple):
    """A figure: the last parts of its outcomes' names, and their tensors [R, N] to [R] fp64."""

    outcomes: tuple[str, ...]
    compute: Callable[..., Tensor]


def _mean(values: Tensor) -> Tensor:
    return values.double().mean(dim=-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part.double().sum(dim=-1) / whole.double().sum(dim=-1).clamp(min=1)


#: By the last part of a figure's name.
METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(("correct",), _mean),
    "worst_group_accuracy": Metric(("correct", "group"), worst_group),
    "auroc": Metric(("score", "positive"), binary_auroc),
    "worst_group_auroc": Metric(("score", "positive", "group"), worst_group_auroc),
    "target_median": Metric(("target",), median),
    "noise_median": Metric(("noise",), median),
    "margin": Metric(("target", "noise"), margin),
    "roc_auc": Metric(("target", "noise"), roc_auc),
    "average_precision": Metric(("target", "noise"), average_precision),
    "kl_bound": Metric(("bound",), _mean),
    "supcon_loss": Metric(("supcon",), _mean),
    "sincere_loss": Metric(("sincere",), _mean),
    "supcon_repelling": Metric(("supcon_repels", "positives"), _ratio),
    "sincere_repelling": Metric(("sincere_repels", "positives"), _ratio),
}

_SUBSET = re.compile(r"(class|group)=(-?\d+)")


class BoundMetric(NamedTuple):
    """A figure's metric and its outcomes, the samples that count only, [N] each; at least one sample."""

    metric: Metric
    outcomes: list[Tensor]

    def value(self) -> float:
        """The figure of the samples as they are."""
        return self.metric.compute(*(outcome[None] for outcome in self.outcomes)).item()


def bind_metric(name: str, outcomes: Mapping[str, Tensor]) -> BoundMetric | None:
    """How the figure called ``name`` follows from ``outcomes`` ([N_test] each, by name); None if it does not.

    Samples that have NaN in one of the outcomes do not count.
    """
    prefix, _, last = name.rpartition("/")
    metric = METRICS.get(last)
    if metric is None:
        return None
    head, _, part = prefix.rpartition("/")
    found = _SUBSET.fullmatch(part)
    names = [f"{head if found else prefix}/{outcome}" for outcome in metric.outcomes]
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
    return BoundMetric(metric, [tensor[keep] for tensor in tensors]) if keep.any() else None


def metric_results(prefix: str, figures: Iterable[str], outcomes: Mapping[str, Tensor]) -> Iterator[Result]:
    """The ``figures`` that follow from ``outcomes``, then the outcomes themselves, all under ``prefix/``."""
    named = {f"{prefix}/{name}": outcome for name, outcome in outcomes.items()}
    for figure in figures:
        found = bind_metric(f"{prefix}/{figure}", named)
        if found is None:
            raise ValueError(f"{prefix}/{figure} does not follow from the outcomes {sorted(outcomes)}")
        yield f"{prefix}/{figure}", found.value()
    yield from named.items()
