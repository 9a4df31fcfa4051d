"""Stratified, seeded splits."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide samples in two, every class in the same proportion.

    Args:
        labels: int64 [N].
        fraction: share of the second part, of each class; rounded, but a class of two or more samples has at
            least
            one on either side.
        seed: the same seed, labels and fraction give the same parts.

    Returns:
        Sorted indices of the first and of the second part, int64, disjoint, together all N.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().flatten()
        take = min(max(round(fraction * len(members)), 1), len(members) - 1)
        second[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Some of the samples, every class in the same proportion.

    Args:
        labels: int64 [N].
        count: samples to keep, at most N and at least one for each class. What the proportion leaves over
            goes to the classes that it cuts most; every class keeps at least one sample.
        seed: the same seed, labels and count give the same samples.

    Returns:
        Sorted indices, int64 [count].
    """
    classes, sizes = labels.unique(sorted=True, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"count must be in [{len(classes)}, {len(labels)}], got {count}")
    exact = sizes.double() * (count / len(labels))
    shares = exact.floor().long().clamp(min=1)
    while (left := count - int(shares.sum())) != 0:  # one class at a time; smaller labels first on a tie
        owed = exact - shares if left > 0 else torch.where(shares > 1, shares - exact, -torch.inf)
        shares[owed.sort(descending=True, stable=True).indices[0]] += 1 if left > 0 else -1
    return cap_per_class(labels, dict(zip(classes.tolist(), shares.tolist(), strict=True)), seed)


def cap_per_class(labels: Tensor, counts: dict[int, int], seed: int) -> Tensor:
    """Of each class as many samples as ``counts`` says, or all if it has fewer, drawn without replacement.

    Args:
        labels: int64 [N].
        counts: label -> samples to keep, every label.
        seed: the same seed, labels and counts give the same samples. Fewer of a class are a part of more.

    Returns:
        Sorted indices, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for label in labels.unique(sorted=True).tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        kept.append(members[order[: counts[label]]])
    return torch.cat(kept).sort().values
