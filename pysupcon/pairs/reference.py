"""The dense reference: similarities and sets as [M, N] matrices, and the sums over them.

For tests and small batches; plain PyTorch that supports higher-order derivatives. Imports only torch.
The equations of the losses on these matrices are the ``dense`` methods in :mod:`pysupcon.losses`.

Symbols: anchors x_i [M, D], candidates c_j [N, D] (the anchors themselves where none are given), similarity
s_ij = x_i . c_j / temperature; P_i positives, N_i negatives, both bool [M, N] and without the anchor itself.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["log_sum_exp", "mean_over", "pair_sets", "similarity"]


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
    """(P, N), bool [M, N]. Either labels [M] (and [N] of the candidates) or ``mask`` [M, N] defines the
    positives.

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


def mean_over(where: Tensor, values: Tensor) -> Tensor:
    """Mean of the values of each row in ``where`` [M]; 0 for an empty set."""
    return torch.where(where, values, 0.0).sum(dim=1) / where.sum(dim=1).clamp(min=1)
