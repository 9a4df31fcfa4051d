"""The operators of :mod:`pysupcon.pairs.ops` in pure PyTorch: O(N) memory, any device, any floating dtype.

The functions have the names, arguments and, up to rounding, the results documented in
``pysupcon/pairs/ops.py``. They serve devices without a compiled kernel and arbitrary positive masks
(:class:`PositiveMask`). :mod:`pysupcon.pairs.tiles` yields the tiles of pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.pairs.ops import stats_dtype
from pysupcon.pairs.slicing import Slice
from pysupcon.pairs.tiles import (  # fmt: skip
    Pairs,
    PositiveMask,
    Side,
    Tile,
    and_not,
    negated,
    no_autocast,
    positive_count,
    readable,
    zero_unless,
)

__all__ = [
    "PositiveMask",
    "check_finite",
    "pair_stats",
    "pair_stats_backward",
    "positive_count",
    "positive_softplus",
    "positive_softplus_backward",
]


class _LogSumExp:
    """Running maximum and sum of exponentials per row; -inf for a row without values."""

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype) -> None:
        self.top = torch.full((count,), -math.inf, dtype=dtype, device=like.device)
        self.total = torch.zeros(count, dtype=dtype, device=like.device)

    def add(
        self, at: Slice, similarity: Tensor, log_weight: Tensor | None, keep: Tensor | bool, dim: int
    ) -> Tensor:
        """Adds a tile; returns the maximum per row, from which the similarities were measured."""
        s = similarity if log_weight is None else similarity + log_weight
        if keep is not True:
            s = torch.where(torch.as_tensor(keep, device=s.device), s, -math.inf)
        top, total = self.top[slice(*at)], self.total[slice(*at)]
        tile_top = s.amax(dim)
        # An empty row has no maximum: any finite reference gives exp(-inf) = 0.
        reference = torch.where(tile_top == -math.inf, 0.0, tile_top)
        tile_total = (s - reference.unsqueeze(dim)).exp_().sum(dim)
        new_top = torch.maximum(top, tile_top)
        finite = torch.where(new_top == -math.inf, 0.0, new_top)
        total.copy_(total * (top - finite).exp() + tile_total * (tile_top - finite).exp())
        top.copy_(new_top)
        return reference

    def value(self, order: Tensor, top_weight: Tensor | None) -> Tensor:
        """Returns the logsumexp by row. The log weights of the tiles are relative to ``top_weight``."""
        value = self.top + self.total.log()
        if top_weight is not None:
            value += top_weight
        return torch.empty_like(self.top).index_copy(0, order, value)


class _Sum:
    """Sum of similarities per row. They are measured from the reference of their logsumexp, which keeps the
    digits of small differences between the two."""

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.zeros(count, dtype=dtype, device=like.device)

    def add(self, at: Slice, similarity: Tensor, reference: Tensor, keep: Tensor | bool, dim: int) -> None:
        part = zero_unless(similarity - reference.unsqueeze(dim), keep).sum(dim)
        count = (
            similarity.shape[dim]
            if keep is True
            else torch.as_tensor(keep, device=similarity.device).sum(dim)
        )
        self.total[slice(*at)] += part.to(self.total.dtype) + count * reference.to(self.total.dtype)

    def value(self, order: Tensor) -> Tensor:
        return torch.empty_like(self.total).index_copy(0, order, self.total)


_LARGEST = 1e15
"""Bound of a similarity times log2(e): a float64 statistic below it has the digits that an exponent needs."""


def check_finite(x: Tensor, candidates: Tensor | None, scale: Tensor) -> Tensor:
    """Checks that rows and scale are finite and similarities not too large.

    Returns:
        0 if every number is finite; otherwise NaN, which the caller adds to every statistic.

    Raises:
        ValueError: on a CPU, outside of a trace.
    """
    zero = scale * 0.0
    largest = scale.detach() * math.log2(math.e)
    for rows in (x, x if candidates is None else candidates):
        if rows.numel():
            low, high = torch.aminmax(rows.detach())  # NaN spreads to both
            zero = zero + (low * 0.0 + high * 0.0).to(scale.dtype)
            largest = largest * torch.maximum(-low, high).to(scale.dtype)
    if not readable(x) or not x.numel():
        return zero
    if not math.isfinite(zero):
        for name, side in (("rows", x), ("candidate rows", candidates)):
            bad = [] if side is None else side.isfinite().all(1).logical_not().nonzero().flatten().tolist()
            if side is not None and bad:
                raise ValueError(
                    f"features must be finite, got NaN or infinity in {len(bad)} of {side.shape[0]} {name}, "
                    f"the first of them row {bad[0]}"
                )
        raise ValueError(f"1 / temperature must be finite, got {scale.item()}")
    if not largest * x.shape[1] < _LARGEST:  # an upper bound; the exact norms are more expensive
        norms = [
            torch.linalg.vector_norm(rows.detach().double(), dim=1).max().item()
            for rows in (x, x if candidates is None else candidates)
        ]
        if not norms[0] * norms[1] * scale.item() * math.log2(math.e) < _LARGEST:
            raise ValueError(
                "features must be small enough for their similarities; the largest |features| |features| / "
                f"temperature is {norms[0] * norms[1] * scale.item():.1e}"
            )
    return zero


def pair_stats(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    instances: Tensor | None,
    candidate_instances: Tensor | None,
    log_weights: Tensor | None,
    candidate_log_weights: Tensor | None,
    negatives: bool,
    positives: bool,
    negative_mean: Tensor | None = None,
    mask: PositiveMask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if negative_mean is not None and candidates is None:
        raise ValueError("negative_mean goes with candidates")
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask,
            instances, candidate_instances, log_weights, candidate_log_weights,
        )  # fmt: skip
        zero_or_nan = check_finite(x, candidates, scale)
        n, p = (_LogSumExp(x.shape[0], x, stats_dtype(x)) for _ in range(2))
        positive_sum, instance_sum = (_Sum(x.shape[0], x, stats_dtype(x)) for _ in range(2))
        for tile in pairs.tiles(only_positives=not negatives, only_negatives=not positives):
            both = [(tile.i, tile.same, pairs.candidates.weights(tile.j, 0), 1)]
            if pairs.symmetric and not tile.diagonal:
                both.append((tile.j, tile.same_back, pairs.anchors.weights(tile.i, 1), 0))
            for at, same, weight, dim in both:
                if negatives and same is not True:
                    n.add(at, tile.similarity, weight, and_not(negated(same), tile.left_out), dim)
                if not positives or same is False:
                    continue
                keep = and_not(same, tile.left_out)
                reference = p.add(at, tile.similarity, weight, keep, dim)
                positive_sum.add(at, tile.similarity, reference, keep, dim)
                if tile.instance is not False:
                    chosen = and_not(tile.instance, tile.left_out)
                    instance_sum.add(at, tile.similarity, reference, chosen, dim)
        result = (
            *(column.value(order, pairs.candidates.top_weight) for column in (n, p)),
            *(column.value(order) for column in (positive_sum, instance_sum)),
        )
        row_n, row_p, row_positive_sum, row_instance_sum = (column + zero_or_nan for column in result)
        if negative_mean is not None:
            one = torch.ones_like(row_n) / scale
            pair_stats_backward(
                x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, instances,
                candidate_instances, log_weights, candidate_log_weights, row_n, row_p, one, one, *(None,) * 8,
                negatives, False, negative_mean, None, mask,
            )  # fmt: skip
    return row_n, row_p, row_positive_sum, row_instance_sum


class _RowStats(NamedTuple):
    """Columns of one side, in label order, for :func:`_weights`.

    ``n`` and ``p`` are the references of the exponentials; ``constant`` is added for positives, and
    ``instance_constant`` for positives of the instance.
    """

    n: Tensor
    p: Tensor
    factor_n: Tensor
    factor_p: Tensor
    constant: Tensor | None
    instance_constant: Tensor | None

    def at(self, rows: Slice, dim: int) -> _RowStats:
        columns = (None if column is None else column[slice(*rows)].unsqueeze(dim) for column in self)
        return _RowStats(*columns)  # type: ignore[arg-type]


def _row_stats(
    side: Side,
    top_weight: Tensor | None,
    n: Tensor,
    p: Tensor,
    grad_n: Tensor,
    grad_p: Tensor,
    grad_positive_sum: Tensor | None,
    grad_instance_sum: Tensor | None,
) -> _RowStats:
    """``top_weight``: of the other side, whose log weights are relative to it."""
    dtype = side.rows.dtype

    def pair(statistic: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        # An empty set contributes nothing: e^(s - inf) = 0, while e^(s + inf) would be infinite. The factor
        # compensates the rounding of the reference.
        empty = statistic == -math.inf
        statistic = statistic if top_weight is None else statistic - top_weight
        reference = statistic.to(dtype)
        factor = grad * (reference.to(statistic.dtype) - statistic).exp()
        reference, factor = torch.where(empty, math.inf, reference), torch.where(empty, 0.0, factor)
        return side.sort(reference, dtype), side.sort(factor, dtype)

    (reference_n, factor_n), (reference_p, factor_p) = pair(n, grad_n), pair(p, grad_p)
    constants = (
        None if grad is None else side.sort(grad, dtype) for grad in (grad_positive_sum, grad_instance_sum)
    )
    return _RowStats(reference_n, reference_p, factor_n, factor_p, *constants)


def _weights(
    similarity: Tensor,
    same: Tensor | bool,
    instance: Tensor | bool,
    row: _RowStats,
    log_weight: Tensor | None,
) -> Tensor:
    """Returns G_ij of all pairs: u_i w_j e^(s_ij - n_i) for negatives, v_i w_j e^(s_ij - p_i) plus the
    constants for positives. The caller masks the pairs that are left out."""
    if isinstance(same, bool):
        reference, factor = (row.p, row.factor_p) if same else (row.n, row.factor_n)
    else:
        reference, factor = torch.where(same, row.p, row.n), torch.where(same, row.factor_p, row.factor_n)
    # No term of a sum is larger than the sum. But another process may have computed a candidate's n, in a
    # product of another shape, which may round s_ij differently.
    exponent = similarity - reference
    if log_weight is not None:
        exponent += log_weight
    weights = exponent.clamp_(max=0.0).exp_().mul_(factor)
    for constant, where in ((row.constant, same), (row.instance_constant, instance)):
        if constant is not None and where is not False:
            weights += zero_unless(constant, where)
    return weights


class _Gradients:
    """Accumulates dL/dx and dL/dcandidates from tiles of G in label order."""

    def __init__(self, pairs: Pairs, need_candidates: bool) -> None:
        self.pairs = pairs
        self.grad_x = torch.zeros_like(pairs.anchors.rows)
        self.grad_candidates = torch.zeros_like(pairs.candidates.rows) if need_candidates else None

    def add(self, tile: Tile, weights: Tensor) -> None:
        """Adds a tile. ``weights`` [i, j] are G_ij; in the symmetric case G_ij + G_ji."""
        i, j = slice(*tile.i), slice(*tile.j)
        self.grad_x[i].addmm_(weights, self.pairs.candidates.rows[j])
        if self.pairs.symmetric:
            if not tile.diagonal:
                self.grad_x[j].addmm_(weights.T, self.pairs.anchors.rows[i])
        elif self.grad_candidates is not None:
            self.grad_candidates[j].addmm_(weights.T, self.pairs.anchors.rows[i])

    def add_to(self, grad_x: Tensor, grad_candidates: Tensor | None) -> None:
        """Adds the sums to the caller's buffers, in the caller's order."""
        for name, buffer, part in (
            ("grad_x", grad_x, self.grad_x),
            ("grad_candidates", grad_candidates, self.grad_candidates),
        ):
            if buffer is not None and part is not None and buffer.shape != part.shape:
                raise ValueError(
                    f"{name} must be of shape {list(part.shape)}, got shape {list(buffer.shape)}"
                )
        # No index occurs twice, so the order of the additions does not matter.
        grad_x.index_add_(0, self.pairs.anchors.order, self.grad_x.mul_(self.pairs.scale))
        if self.grad_candidates is not None and grad_candidates is not None:
            part = self.grad_candidates.mul_(self.pairs.scale)
            grad_candidates.index_add_(0, self.pairs.candidates.order, part)


def pair_stats_backward(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    instances: Tensor | None,
    candidate_instances: Tensor | None,
    log_weights: Tensor | None,
    candidate_log_weights: Tensor | None,
    n: Tensor,
    p: Tensor,
    grad_n: Tensor,
    grad_p: Tensor,
    grad_positive_sum: Tensor | None,
    grad_instance_sum: Tensor | None,
    candidate_n: Tensor | None,
    candidate_p: Tensor | None,
    candidate_grad_n: Tensor | None,
    candidate_grad_p: Tensor | None,
    candidate_grad_positive_sum: Tensor | None,
    candidate_grad_instance_sum: Tensor | None,
    negatives: bool,
    positives: bool,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
    mask: PositiveMask | None = None,
) -> None:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask,
            instances, candidate_instances, log_weights, candidate_log_weights, candidate_n is not None,
        )  # fmt: skip

        def stats(side: Side, other: Side, *columns: Tensor | None) -> _RowStats:
            n, p, *grads = columns
            assert n is not None
            assert p is not None
            side.check(*(column for column in columns if column is not None))
            empty = torch.full_like(n, -math.inf)
            n, p = n if negatives else empty, p if positives else empty
            sums = grads[2:] if positives else [None, None]
            return _row_stats(side, other.top_weight, n, p, *grads[:2], *sums)  # type: ignore[arg-type]

        anchors, others = pairs.anchors, pairs.candidates
        own = stats(anchors, others, n, p, grad_n, grad_p, grad_positive_sum, grad_instance_sum)
        back = own if pairs.symmetric else None
        if candidate_n is not None:
            back = stats(
                others,
                anchors,
                candidate_n,
                candidate_p,
                candidate_grad_n,
                candidate_grad_p,
                candidate_grad_positive_sum,
                candidate_grad_instance_sum,
            )
        gradients = _Gradients(pairs, grad_candidates is not None)
        for tile in pairs.tiles(only_positives=not negatives, only_negatives=not positives):
            relations = tile.same, tile.instance
            weights = _weights(tile.similarity, *relations, own.at(tile.i, 1), others.weights(tile.j, 0))
            if back is not None:
                relations = tile.same_back, tile.instance
                weights += _weights(
                    tile.similarity, *relations, back.at(tile.j, 0), anchors.weights(tile.i, 1)
                )
            if tile.left_out is not None:
                weights.masked_fill_(tile.left_out, 0.0)
            gradients.add(tile, weights)
        gradients.add_to(grad_x, grad_candidates)


def positive_softplus(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    log_weights: Tensor | None,
    candidate_log_weights: Tensor | None,
    n: Tensor,
    epsilon: float,
    mask: PositiveMask | None = None,
) -> Tensor:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask,
            log_weights=log_weights, candidate_log_weights=candidate_log_weights,
        )  # fmt: skip
        limit = pairs.anchors.sort(n, pairs.scale.dtype) + epsilon
        total = torch.zeros(x.shape[0], dtype=stats_dtype(x), device=x.device)
        for tile in pairs.tiles(only_positives=True):
            both = [(tile.i, tile.same, pairs.candidates.absolute_weights(tile.j, 0), 1)]
            if pairs.symmetric and not tile.diagonal:
                both.append((tile.j, tile.same_back, pairs.anchors.absolute_weights(tile.i, 1), 0))
            for at, same, weight, dim in both:
                # softplus(a) = -logsigmoid(-a), without a threshold and with softplus(-inf) = 0.
                excess = tile.similarity - limit[slice(*at)].unsqueeze(dim)
                terms = -F.logsigmoid(excess) if weight is None else torch.logaddexp(weight, -excess)
                total[slice(*at)] += zero_unless(terms, and_not(same, tile.left_out)).sum(dim)
        return torch.empty_like(total).index_copy(0, order, total)


def _sigmoid(excess: Tensor, log_weight: Tensor | None) -> Tensor:
    return torch.sigmoid(excess if log_weight is None else excess - log_weight)


def positive_softplus_backward(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    log_weights: Tensor | None,
    candidate_log_weights: Tensor | None,
    n: Tensor,
    epsilon: float,
    grad_total: Tensor,
    candidate_n: Tensor | None,
    candidate_grad_total: Tensor | None,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
    mask: PositiveMask | None = None,
) -> Tensor:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask,
            log_weights=log_weights, candidate_log_weights=candidate_log_weights,
            column_side=candidate_n is not None,
        )  # fmt: skip
        dtype = pairs.scale.dtype
        limit, grad = pairs.anchors.sort(n, dtype) + epsilon, pairs.anchors.sort(grad_total, dtype)
        back_limit, back_grad = (limit, grad) if pairs.symmetric else (None, None)
        if candidate_n is not None:
            assert candidate_grad_total is not None
            back_limit = pairs.candidates.sort(candidate_n, dtype) + epsilon
            back_grad = pairs.candidates.sort(candidate_grad_total, dtype)
        grad_n = torch.zeros(x.shape[0], dtype=stats_dtype(x), device=x.device)
        gradients = _Gradients(pairs, grad_candidates is not None)
        for tile in pairs.tiles(only_positives=True):
            # dl_i/dn_i = sum_j sigma_ij and dl_i/ds_ij = -sigma_ij, sigma_ij = sigmoid(n_i - s_ij - log w_j +
            # epsilon)
            i, j = slice(*tile.i), slice(*tile.j)
            weights = _sigmoid(limit[i, None] - tile.similarity, pairs.candidates.absolute_weights(tile.j, 0))
            weights = weights.mul_(grad[i, None])
            weights = zero_unless(weights, and_not(tile.same, tile.left_out))
            grad_n[i] += weights.sum(1)
            if back_limit is not None and back_grad is not None:
                log_weight = pairs.anchors.absolute_weights(tile.i, 1)
                back = _sigmoid(back_limit[None, j] - tile.similarity, log_weight).mul_(back_grad[None, j])
                back = zero_unless(back, and_not(tile.same_back, tile.left_out))
                if pairs.symmetric and not tile.diagonal:
                    grad_n[j] += back.sum(0)
                weights = weights + back
            gradients.add(tile, -weights)
        gradients.add_to(grad_x, grad_candidates)
        return torch.empty_like(grad_n).index_copy(0, order, grad_n)
