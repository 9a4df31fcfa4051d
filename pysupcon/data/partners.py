"""How many samples of a batch have a partner, another sample of their class in it: exact expectations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shuffled_share(counts: Tensor, batch_size: int, unknown: int = 0) -> float:
    """Expected share of the samples with a partner in a batch that is drawn without replacement.

    Sample i of a class of n_i samples has none with the probability C(N - n_i, B - 1) / C(N - 1, B - 1).

    Args:
        counts: samples of each class, int64 [classes].
        batch_size: B, at most N.
        unknown: samples whose class is not known, part of N. They are no partners and do not enter the mean.

    Returns:
        The mean over all samples of known class.
    """
    sizes, repeats = counts[counts > 0].unique(return_counts=True)
    labelled = int((sizes * repeats).sum())
    total, others = labelled + unknown, batch_size - 1
    alone = sum(
        size * repeat * math.exp(_log_binomial(total - size, others) - _log_binomial(total - 1, others))
        for size, repeat in zip(sizes.tolist(), repeats.tolist(), strict=True)
    )
    return 1 - alone / labelled


def balanced_share(classes_of_groups: Tensor, batch_size: int) -> float:
    """Expected share of the samples with a partner in a batch of equally many samples of every group.

    With B samples and K groups, every group has q = B // K samples, and B - q K groups have one more. If each
    group is a class of its own, the share is 0 for B <= K, 2 (B - K) / B for K < B < 2 K, else 1.

    Args:
        classes_of_groups: class of each group, int64 [K].
        batch_size: B.
    """
    groups = len(classes_of_groups)
    quota, extra = divmod(batch_size, groups)
    if quota == 0:  # one sample each of B groups
        return shuffled_share(torch.bincount(classes_of_groups), batch_size)
    if quota > 1:
        return 1.0
    single = int((torch.bincount(classes_of_groups) == 1).sum())  # classes of one group
    return 1 - single * (1 - extra / groups) / batch_size


def _log_binomial(n: int, k: int) -> float:
    if k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
