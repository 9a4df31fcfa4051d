"""The losses as functions. Shapes, arguments and errors are the same for all; see below.

Similarity s_ij = z_i . z_j / temperature. For an anchor i, P_i are the other rows of its class, N_i the rows
of other classes, A_i the other rows of its sample (its views). The N x N matrix is never stored.

Args:
    features: [B, V, D] (V views of B samples) or [N, D]; float64, float32, bfloat16 or float16. Not
        normalised unless ``normalize=True``.
    labels: integers [B] or [N] of any integer dtype, any values (uint64 beyond int64: modulo 2^64). None: the
        positives of a row are the other rows of its sample. Several labels per sample: bool or 0/1 [B, C]
        (see ``multi_label`` of :class:`Options`).
    mask: bool [B, B] (or [samples of features, samples of candidates]) instead of labels: row j is a positive
        of row i where ``mask[i, j]``; it need not be symmetric. Runs on the tiled backend.
    temperature: a number, of Python or NumPy, or a tensor of one element; from 1e-12 to 1e12. A tensor gets a
        gradient of its own shape. Its value is read only on a CPU and not while it is traced
        (``torch.compile``). ``base_temperature`` likewise. ``epsilon`` (from -1e4 to 1e4) and ``alpha`` (from
        0 to 1) are numbers, or tensors of one element with requires_grad=False.
    **options: the fields of :class:`Options`, which has a paragraph on each.

Returns:
    float32 (float64 for float64 features); gradients have the dtype of their inputs. Anchors without a
    positive are skipped. If no anchor has a positive, the loss is 0 (with a graph), and on a CPU a warning is
    issued. Second derivatives are refused (except by backend="reference").

Raises:
    ValueError, TypeError: an argument is invalid; the message names it, the requirement and the value. On a
        CPU also if features are not finite, or if the largest |z| |z| / temperature is beyond 7e14. On a GPU
        there is no such check, because it would synchronise; the loss is NaN.
    RuntimeError: the backend is not compiled, or CUDA kernels answer wrongly or cannot run on the device. If
        an argument is changed in place between forward and backward, autograd refuses the backward, or the
        change has no effect. Changes through NumPy or ``.data`` are not seen.

torch.compile(fullgraph=True), torch.export, make_fx, fake and meta tensors see one operator,
``pysupcon::row_statistics``: batch sizes and numbers (temperature, alpha, epsilon, base_temperature) may
change without a new graph. torch.func's grad, vmap and jacrev work. Forward mode (jvp, jacfwd, hessian, dual
numbers) and torch.jit.trace are refused, except by backend="reference". Of torch.func inside torch.compile
only what torch can trace works (it refuses vmap of grad).

>>> import torch
>>> from pysupcon import functional
>>> rows = torch.eye(2).repeat(2, 1)  # [N, D]: two classes, two rows each
>>> functional.supcon(rows, torch.tensor([0, 1, 0, 1]), temperature=1.0)
tensor(0.5514)

Further candidates: a memory bank or queue, negatives of single samples, weights (below: each class counts
once, whatever its size), and rows whose label is not known.

>>> labels, keys = torch.tensor([0, 1, 0, 1]), torch.eye(2)
>>> functional.supcon(rows, labels, temperature=1.0, memory=keys, memory_labels=torch.tensor([0, 1]))
tensor(1.1326)
>>> functional.info_nce(rows, candidates=rows, memory=keys, batch_negatives=False, temperature=1.0)  # MoCo
tensor(0.8620)
>>> functional.supcon(rows, labels, temperature=1.0, hard_negatives=-rows.unsqueeze(1))  # [B, K, D]
tensor(0.6265)
>>> functional.supcon(rows, labels, temperature=1.0, class_balance=True)
tensor(0.3133)
>>> functional.supcon(rows, torch.tensor([0, 1, 0, -1]), temperature=1.0, ignore_index=-1)
tensor(0.3133)
>>> tags = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0]])  # [B, C]: any number of labels per row
>>> [functional.supcon(rows, tags, temperature=1.0, multi_label=m) for m in ("per_label", "any", "jaccard")]
[tensor(0.8014), tensor(0.8014), tensor(0.7514)]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from pysupcon.contrastive import build_problem, dense_sets
from pysupcon.hierarchies import hierarchical_supcon
from pysupcon.losses import *  # noqa: F403
from pysupcon.losses import LOSSES_BY_NAME
from pysupcon.options import MetricsOptions, Options, StatisticsOptions, expand_signature
from pysupcon.pairs.metrics import similarity_metrics
from pysupcon.pairs.problem import Gather
from pysupcon.pairs.reference import log_sum_exp

__all__ = [
    "ContrastiveMetrics",
    "Gather",
    "Options",
    "PairStatistics",
    "contrastive_accuracy",
    "contrastive_metrics",
    "hierarchical_supcon",
    "pair_statistics",
    *sorted({loss.function.__name__ for loss in LOSSES_BY_NAME.values()}),
]


class PairStatistics(NamedTuple):
    """Statistics of every anchor [M] (rows of [B, V, D] are b * V + v); differentiable once."""

    negative_logsumexp: Tensor
    """n_i = log sum over N_i of e^{s_ij}; -inf where there is no negative"""
    positive_logsumexp: Tensor
    """p_i = log sum over P_i of e^{s_ij}; -inf where there is no positive"""
    positive_mean: Tensor
    """mean over P_i of s_ij; 0 where there is no positive"""
    positive_count: Tensor
    """|P_i|, int64"""


@expand_signature
def pair_statistics(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    **options: Unpack[StatisticsOptions],
) -> PairStatistics:
    """Statistics per anchor, from which you can build your own loss. Arguments: module docstring of
    :mod:`pysupcon.functional`, without ``reduction``.

    Empty sets are -inf: select (``torch.where``) before using them, or a gradient becomes NaN. Statistics are
    float64 (float32 on devices that have no float64).
    """
    problem, _ = build_problem(
        "pair_statistics",
        features,
        labels,
        mask,
        options,
        temperature,
        False,
        refused=("reduction", "anchor_weights"),
    )
    count = problem.count
    if problem.backend == "reference":
        s, positives, negatives, _, weighted = dense_sets(problem)
        n, p = log_sum_exp(weighted, negatives), log_sum_exp(weighted, positives)
        total = torch.where(positives, s, 0.0).sum(dim=1)
    else:
        requested = {"negatives": True, "positives": True}
        if problem.global_batch is None:
            statistics = problem.statistics(**requested)
        else:
            from pysupcon.pairs.gathered import gathered_statistics

            statistics = gathered_statistics(problem, requested)
        n, p, total = statistics.n, statistics.p, statistics.positive_sum
    if problem.ignored is not None:  # their sum is over other ignored rows
        total = torch.where(count > 0, total, 0.0)
    return PairStatistics(n, p, total / count.clamp(min=1), count)


class ContrastiveMetrics(NamedTuple):
    """Figures of a batch: scalars without gradient, float32 (float64 for float64 features). Anchors without a
    positive are skipped; a mean over nothing is NaN."""

    accuracy: Tensor
    """Share of the anchors whose most similar candidate is a positive (top-1)"""
    positive_similarity: Tensor
    """Mean of z_i . z_j over all pairs of an anchor and a positive"""
    negative_similarity: Tensor
    """Mean of z_i . z_j over all pairs of an anchor and a negative"""


@expand_signature
def contrastive_metrics(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[MetricsOptions],
) -> ContrastiveMetrics:
    """Top-1 accuracy, and mean similarities of positives and negatives, in O(N) memory.

    An anchor is correct if one of its positives is more similar to it than all of its negatives; a tie
    between a positive and a negative is an error. Similarities are not divided by a temperature: they are
    cosines for rows of unit length (``normalize=True``). With labels [B, C], rows that share a label are
    positives. Arguments: module docstring of :mod:`pysupcon.functional`, without ``temperature``,
    ``reduction``, ``backend``, ``gather``, ``candidate_weights``, ``anchor_weights`` and ``class_balance``.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> contrastive_metrics(rows, torch.tensor([0, 0, 1, 1]))  # the rows in the middle are too close
    ContrastiveMetrics(accuracy=tensor(0.5000), positive_similarity=tensor(0.8000), \
negative_similarity=tensor(0.5400))
    """
    unknown = sorted(options.keys() - MetricsOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"contrastive_metrics() got an unexpected keyword argument {unknown[0]!r}")
    given = {**options, "backend": "tiled", "multi_label": "any"}
    problem, _ = build_problem("contrastive_metrics", features, labels, mask, given, 1.0, False, ())
    return ContrastiveMetrics(*similarity_metrics(problem))


@expand_signature
def contrastive_accuracy(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[MetricsOptions],
) -> Tensor:
    """Share of the anchors whose most similar candidate is a positive: the first field of
    :func:`contrastive_metrics`, which has the arguments."""
    return contrastive_metrics(features, labels, mask, **options).accuracy
