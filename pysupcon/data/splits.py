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
