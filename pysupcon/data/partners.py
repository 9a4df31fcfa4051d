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


def balanced_share(classes_of_groups: Tensor, counts: Tensor, batch_size: int, processes: int = 1) -> float:
    """Expected share of the samples with a partner in a batch of equally many samples of every group.

    With B samples and K groups, every group has q = B // K samples, and B - q K groups have one more. If each
    group is a class of its own and has as many samples as a batch takes, the share is 0 for B <= K,
    2 (B - K) / B for K < B < 2 K, else 1. A smaller group repeats its samples; a copy is no partner.

    Args:
        classes_of_groups: class of each group, int64 [K].
        counts: training samples of each group, int64 [K].
        batch_size: B, in each process.
        processes: processes that divide a batch with stride ``processes``; each contrasts its own part.
    """
    groups = len(classes_of_groups)
    if batch_size < groups:  # one sample each of B groups
        return shuffled_share(torch.bincount(classes_of_groups), batch_size)
    quota, extra = divmod(batch_size * processes, groups)
    only_group = torch.bincount(classes_of_groups)[classes_of_groups] == 1  # other classes have two samples
    sizes, repeats = counts[only_group].unique(return_counts=True)
    alone = sum(
        repeat
        * (
            _drawn_alone(size, quota, processes) * (1 - extra / groups)
            + _drawn_alone(size, quota + 1, processes) * extra / groups
        )
        for size, repeat in zip(sizes.tolist(), repeats.tolist(), strict=True)
    )
    return 1 - alone / (batch_size * processes)


def per_class_share(counts: Tensor) -> float:
    """Share of the samples with a partner in batches of two or more samples of each drawn class.

    The classes are drawn equally often. Those of a single sample have copies of it.

    Args:
        counts: samples of each class, int64 [classes].
    """
    return int((counts > 1).sum()) / int((counts > 0).sum())


def _drawn_alone(size: int, drawn: int, processes: int) -> float:
    """Expected number of ``drawn`` samples of a group of ``size`` that meet no other one in their process.

    The samples are permutations of the group, one after the other. Two of one permutation differ; two of
    different ones are copies with the probability 1 / size.
    """
    alone = 0.0
    for process in range(processes):
        rounds = [place // size for place in range(process, drawn, processes)]
        if len(set(rounds)) == len(rounds) > 0:
            alone += len(rounds) * size ** (1 - len(rounds))
    return alone


def _log_binomial(n: int, k: int) -> float:
    if k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
