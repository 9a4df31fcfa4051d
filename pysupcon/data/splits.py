"""Stratified, seeded splits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pysupcon.errors import ConfigError


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples in two, with the same proportion in every class.

    Args:
        labels: int64 [N].
        fraction: fraction of each class in the second part, rounded. A class of two or more samples has at
            least one sample in each part.
        seed: seed of the split.

    Returns:
        Sorted indices of the first and of the second part, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().flatten()
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        second[members[torch.randperm(len(members), generator=generator)[:size]]] = True
    return (~second).nonzero().flatten(), second.nonzero().flatten()


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Select ``count`` samples, with the same proportion of every class.

    Args:
        labels: int64 [N].
        count: samples to keep, at least one per class and at most N. Class sizes are rounded by the largest
            remainders; every class keeps at least one sample.
        seed: seed of the selection.

    Returns:
        Sorted indices, int64 [count].
    """
    classes, sizes = labels.unique(sorted=True, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"count must be in [{len(classes)}, {len(labels)}], got {count}")
    exact = sizes.double() * (count / len(labels))
    shares = exact.floor().long().clamp(min=1)
    while (left := count - int(shares.sum())) != 0:  # one class at a time; a tie goes to the smaller label
        remainder = exact - shares if left > 0 else torch.where(shares > 1, shares - exact, -torch.inf)
        shares[remainder.sort(descending=True, stable=True).indices[0]] += 1 if left > 0 else -1
    return cap_per_class(labels, dict(zip(classes.tolist(), shares.tolist(), strict=True)), seed)


def cap_per_class(labels: Tensor, counts: dict[int, int], seed: int) -> Tensor:
    """Select up to ``counts[label]`` samples of each class, without replacement.

    Args:
        labels: int64 [N].
        counts: samples to keep of every label.
        seed: seed of the selection. With one seed, a smaller selection is a subset of a larger one.

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


def rare_counts(labels: Tensor, names: Sequence[str], fractions: Mapping[str, float]) -> dict[int, int]:
    """Samples to keep of every class, for :func:`cap_per_class`.

    Args:
        labels: int64 [N].
        names: name of every class.
        fractions: fraction of a class to keep, by its name; rounded, at least one sample.

    Raises:
        ConfigError: a name is not that of a class with training samples.
    """
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    for name, fraction in fractions.items():
        label = names.index(name) if name in names else -1
        if label < 0 or counts[label] == 0:
            there = [other for other, count in zip(names, counts, strict=True) if count]
            similar = difflib.get_close_matches(name, there, 3) or there[:10]
            raise ConfigError(
                f"data.train_fractions must name fine classes that have training images, got {name!r} "
                f"(there are {len(there)}, for instance {', '.join(similar)})"
            )
        counts[label] = max(round(fraction * counts[label]), 1)
    return dict(enumerate(counts))
