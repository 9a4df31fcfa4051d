"""The dense truth: every loss written as its equation, on the whole [M, N] matrix of similarities.

For tests and small batches; plain PyTorch that autograd differentiates as often as wanted. Knows torch only.

Symbols: anchors x_i [M, D], candidates c_j [N, D] (the anchors themselves where none are given), similarity
s_ij = x_i . c_j / temperature; P_i positives, N_i negatives, A_i the other rows of the anchor's instance; all
of them bool [M, N] and without the anchor itself. An anchor for which a loss is not defined gets 0.

Sources: SupCon, Khosla et al. 2020 (arXiv 2004.11362), L_out, equation 2; SINCERE, Feeney and Hughes 2023
(arXiv 2309.14277); epsilon-SupInfoNCE, Barbano et al. 2022 (arXiv 2211.05568); class-conditional InfoNCE and
L_spread, Chen et al. 2022 (arXiv 2204.07596).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = [
    "class_conditional_info_nce",
    "info_nce",
    "log_sum_exp",
    "pair_sets",
    "similarity",
    "sincere",
    "spread",
    "supcon",
]


def similarity(x: Tensor, candidates: Tensor | None, temperature: float | Tensor) -> Tensor:
    """s_ij [M, N], at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    others = x if candidates is None else candidates.to(x.dtype)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return x @ others.T / temperature


def pair_sets(
    labels: Tensor | None,
    candidate_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(P, N), bool [M, N]. Either labels [M] (and [N] of the candidates) or ``mask`` [M, N] says who is a
    positive.

    Without candidates (``candidate_labels`` None, and ``mask`` square with ``self_index`` None) an anchor is
    not its own candidate; with them ``self_index`` [M] names the candidate that is the anchor, -1 for none.
    """
    if mask is not None:
        same = mask
    else:
        assert labels is not None
        others = labels if candidate_labels is None else candidate_labels
        same = labels[:, None] == others[None, :]
    rows, columns = same.shape
    if self_index is not None:
        other = self_index[:, None] != torch.arange(columns, device=same.device)[None, :]
    elif candidate_labels is None:
        other = ~torch.eye(rows, columns, dtype=torch.bool, device=same.device)
    else:
        other = torch.ones_like(same)
    return same & other, ~same & other


def log_sum_exp(s: Tensor, where: Tensor) -> Tensor:
    """log sum_{j in where_i} e^{s_ij} [M]; -inf for an empty set."""
    return s.masked_fill(~where, -math.inf).logsumexp(dim=1)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def supcon(s: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """-mean_{p in P_i} log( e^{s_ip} / sum_{j in P_i + N_i} e^{s_ij} )."""
    log_probability = s - log_sum_exp(s, positives | negatives)[:, None]
    return torch.where(positives.any(dim=1), -_mean(log_probability, positives), 0.0)


def sincere(s: Tensor, positives: Tensor, negatives: Tensor, epsilon: float = 0.0) -> Tensor:
    """-mean_{p in P_i} log( e^{s_ip} / (e^{s_ip - epsilon} + sum_{j in N_i} e^{s_ij}) )."""
    denominator = torch.logaddexp(s - epsilon, log_sum_exp(s, negatives)[:, None])
    return torch.where(positives.any(dim=1), _mean(denominator - s, positives), 0.0)


def class_conditional_info_nce(s: Tensor, positives: Tensor, instances: Tensor) -> Tensor:
    """-mean_{a in A_i} log( e^{s_ia} / sum_{p in P_i} e^{s_ip} )."""
    valid = instances.any(dim=1) & positives.any(dim=1)
    log_probability = s - log_sum_exp(s, positives)[:, None]
    return torch.where(valid, -_mean(log_probability, instances), 0.0)


def spread(
    s: Tensor, positives: Tensor, negatives: Tensor, instances: Tensor, alpha: float, base: str
) -> Tensor:
    """(1 - alpha) * base + alpha * class-conditional InfoNCE."""
    first = supcon(s, positives, negatives) if base == "supcon" else sincere(s, positives, negatives)
    return (1 - alpha) * first + alpha * class_conditional_info_nce(s, positives, instances)


def info_nce(s: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """SupCon whose positives are the other rows of the anchor's instance."""
    return supcon(s, positives, negatives)
