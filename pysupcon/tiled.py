"""The operators of :mod:`pysupcon._ops` in pure PyTorch: O(N) memory, any device, any floating dtype.

Same six functions, same argument order, same results up to rounding; the contract stands in
``pysupcon/_ops.py``. This is the path of devices without a compiled kernel and of arbitrary positive masks
(:class:`PositiveMask`). How pairs are visited: :mod:`pysupcon._tiles`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tiles import (
    ROW_CHUNK,
    Pairs,
    PositiveMask,
    Side,
    Slice,
    Tile,
    and_not,
    check_operands,
    class_sums,
    look_up,
    negated,
    no_autocast,
    own_candidate,
    positive_count,
    slices,
    stats_dtype,
    zero_unless,
)  # fmt: skip

__all__ = [
    "PositiveMask",
    "pair_stats",
    "pair_stats_backward",
    "positive_count",
    "positive_softplus",
    "positive_softplus_backward",
    "positive_sum",
    "positive_sum_backward",
    "stats_dtype",
]


class _LogSumExp:
    """Running maximum and sum of exponentials per row; merging two empty parts gives empty."""

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype) -> None:
        self.top = torch.full((count,), -math.inf, dtype=dtype, device=like.device)
        self.total = torch.zeros(count, dtype=dtype, device=like.device)

    def add(self, at: Slice, similarity: Tensor, keep: Tensor | bool, dim: int) -> None:
        if keep is False:
            return
        s = similarity if keep is True else torch.where(torch.as_tensor(keep), similarity, -math.inf)
        top, total = self.top[slice(*at)], self.total[slice(*at)]
        tile_top = s.amax(dim)
        # An empty row has no maximum: any finite reference gives exp(-inf) = 0.
        reference = torch.where(tile_top == -math.inf, 0.0, tile_top)
        tile_total = (s - reference.unsqueeze(dim)).exp_().sum(dim)
        new_top = torch.maximum(top, tile_top)
        finite = torch.where(new_top == -math.inf, 0.0, new_top)
        total.copy_(total * (top - finite).exp() + tile_total * (tile_top - finite).exp())
        top.copy_(new_top)

    def value(self, order: Tensor) -> Tensor:
        return torch.empty_like(self.top).index_copy_(0, order, self.top + self.total.log())


def _refuse_non_finite(*statistics: Tensor) -> None:
    """On a CPU a NaN or an overflow shows here for nothing; elsewhere looking would make the device wait."""
    for statistic in statistics:
        if statistic.device.type == "cpu" and not torch.compiler.is_compiling() and statistic.numel():
            top = statistic.max().item()  # NaN spreads to the maximum
            if not top < math.inf:
                raise ValueError(f"features must be finite, got a similarity statistic of {top}")


def pair_stats(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    negatives: bool,
    positives: bool,
    mask: PositiveMask | None = None,
) -> tuple[Tensor, Tensor]:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
        )
        n = _LogSumExp(x.shape[0], x, stats_dtype(x))
        p = _LogSumExp(x.shape[0], x, stats_dtype(x))
        for tile in pairs.tiles(only_positives=not negatives, only_negatives=not positives):
            both = [(tile.i, tile.same, 1)]
            if pairs.symmetric and not tile.diagonal:
                both.append((tile.j, tile.same_back, 0))
            for at, same, dim in both:
                if negatives:
                    n.add(at, tile.similarity, and_not(negated(same), tile.left_out), dim)
                if positives:
                    p.add(at, tile.similarity, and_not(same, tile.left_out), dim)
        result = n.value(order), p.value(order)
    _refuse_non_finite(*result)
    return result


def _weights(
    similarity: Tensor, same: Tensor | bool, n: Tensor, p: Tensor, grad_n: Tensor, grad_p: Tensor
) -> Tensor:
    """G_ij before pairs are left out: u_i e^(s_ij - n_i) for negatives, v_i e^(s_ij - p_i) for positives."""
    if isinstance(same, bool):
        reference, grad = (p, grad_p) if same else (n, grad_n)
    else:
        reference, grad = torch.where(same, p, n), torch.where(same, grad_p, grad_n)
    return (similarity - reference).exp_().mul_(grad)


class _RowStats(NamedTuple):
    n: Tensor
    p: Tensor
    grad_n: Tensor
    grad_p: Tensor

    def at(self, rows: Slice, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, p, u, v = (column[slice(*rows)].unsqueeze(dim) for column in self)
        return n, p, u, v


def _row_stats(side: Side, n: Tensor, p: Tensor, grad_n: Tensor, grad_p: Tensor) -> _RowStats:
    dtype = side.rows.dtype
    side.check(n, p, grad_n, grad_p)

    def reference(column: Tensor) -> Tensor:
        # An empty set contributes nothing: e^(s - inf) = 0, where e^(s + inf) would be infinite.
        return side.sort(torch.where(column == -math.inf, math.inf, column), dtype)

    return _RowStats(
        reference(n),
        reference(p),
        side.sort(torch.where(n == -math.inf, 0.0, grad_n), dtype),
        side.sort(torch.where(p == -math.inf, 0.0, grad_p), dtype),
    )


class _Gradients:
    """Accumulates dL/dx and dL/dcandidates from tiles of G in label order."""

    def __init__(self, pairs: Pairs, need_candidates: bool) -> None:
        self.pairs = pairs
        self.grad_x = torch.zeros_like(pairs.anchors.rows)
        self.grad_candidates = torch.zeros_like(pairs.candidates.rows) if need_candidates else None

    def add(self, tile: Tile, weights: Tensor) -> None:
        """``weights`` [i, j]: in the symmetric case G_ij + G_ji already."""
        i, j = slice(*tile.i), slice(*tile.j)
        self.grad_x[i].addmm_(weights, self.pairs.candidates.rows[j])
        if self.pairs.symmetric:
            if not tile.diagonal:
                self.grad_x[j].addmm_(weights.T, self.pairs.anchors.rows[i])
        elif self.grad_candidates is not None:
            self.grad_candidates[j].addmm_(weights.T, self.pairs.anchors.rows[i])

    def add_to(self, grad_x: Tensor, grad_candidates: Tensor | None) -> None:
        """In the caller's order, once."""
        for name, into, part in (
            ("grad_x", grad_x, self.grad_x),
            ("grad_candidates", grad_candidates, self.grad_candidates),
        ):
            if into is not None and part is not None and into.shape != part.shape:
                raise ValueError(f"{name} must be of shape {list(part.shape)}, got shape {list(into.shape)}")
        # No index comes twice: the order of the additions does not matter.
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
    n: Tensor,
    p: Tensor,
    grad_n: Tensor,
    grad_p: Tensor,
    candidate_n: Tensor | None,
    candidate_p: Tensor | None,
    candidate_grad_n: Tensor | None,
    candidate_grad_p: Tensor | None,
    negatives: bool,
    positives: bool,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
    mask: PositiveMask | None = None,
) -> None:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
        )
        own = _row_stats(pairs.anchors, n, p, grad_n, grad_p)
        back = own if pairs.symmetric else None
        if candidate_n is not None:
            assert candidate_p is not None
            assert candidate_grad_n is not None
            assert candidate_grad_p is not None
            back = _row_stats(pairs.candidates, candidate_n, candidate_p, candidate_grad_n, candidate_grad_p)
        gradients = _Gradients(pairs, grad_candidates is not None)
        for tile in pairs.tiles(only_positives=not negatives, only_negatives=not positives):
            weights = _weights(tile.similarity, tile.same, *own.at(tile.i, 1))
            if back is not None:
                weights += _weights(tile.similarity, tile.same_back, *back.at(tile.j, 0))
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
    n: Tensor,
    epsilon: float,
    mask: PositiveMask | None = None,
) -> Tensor:
    with no_autocast(x), torch.no_grad():
        pairs = Pairs(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
        )
        limit = pairs.anchors.sort(n, pairs.scale.dtype) + epsilon
        total = torch.zeros(x.shape[0], dtype=stats_dtype(x), device=x.device)
        for tile in pairs.tiles(only_positives=True):
            both = [(tile.i, tile.same, 1)]
            if pairs.symmetric and not tile.diagonal:
                both.append((tile.j, tile.same_back, 0))
            for at, same, dim in both:
                # softplus(a) = -logsigmoid(-a), without a threshold and with softplus(-inf) = 0.
                terms = F.logsigmoid(tile.similarity - limit[slice(*at)].unsqueeze(dim))
                total[slice(*at)] -= zero_unless(terms, and_not(same, tile.left_out)).sum(dim)
        result = torch.empty_like(total).index_copy_(0, order, total)
    _refuse_non_finite(result)
    return result


def positive_softplus_backward(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
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
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
        )
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
            # dl_i/dn_i = sum_j sigma_ij and dl_i/ds_ij = -sigma_ij, sigma_ij = sigmoid(n_i - s_ij + epsilon)
            i, j = slice(*tile.i), slice(*tile.j)
            weights = torch.sigmoid(limit[i, None] - tile.similarity).mul_(grad[i, None])
            weights = zero_unless(weights, and_not(tile.same, tile.left_out))
            grad_n[i] += weights.sum(1)
            if back_limit is not None and back_grad is not None:
                back = torch.sigmoid(back_limit[None, j] - tile.similarity).mul_(back_grad[None, j])
                back = zero_unless(back, and_not(tile.same_back, tile.left_out))
                if pairs.symmetric and not tile.diagonal:
                    grad_n[j] += back.sum(0)
                weights = weights + back
            gradients.add(tile, -weights)
        gradients.add_to(grad_x, grad_candidates)
        return torch.empty_like(grad_n).index_copy_(0, order, grad_n)


def positive_sum(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    mask: PositiveMask | None = None,
) -> Tensor:
    with no_autocast(x), torch.no_grad():
        total = torch.zeros(x.shape[0], dtype=stats_dtype(x), device=x.device)
        if mask is not None:
            pairs = Pairs(
                x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
            )
            for tile in pairs.tiles(only_positives=True):
                both = [(tile.i, tile.same, 1)]
                if pairs.symmetric and not tile.diagonal:
                    both.append((tile.j, tile.same_back, 0))
                for at, same, dim in both:
                    total[slice(*at)] += zero_unless(tile.similarity, and_not(same, tile.left_out)).sum(dim)
            return torch.empty_like(total).index_copy_(0, order, total)
        check_operands(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, True
        )
        if candidates is None:
            sums = class_sums(x, None, labels, order)
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            sums = class_sums(candidates, None, candidate_labels, candidate_order)
        for at in slices(x.shape[0], ROW_CHUNK):
            part = look_up(sums, labels[slice(*at)])
            own = own_candidate(x, candidates, self_index, at, part.dtype)
            part = part if own is None else part - own
            total[slice(*at)] = part.mul_(x[slice(*at)]).sum(1)
        return total * scale


def positive_sum_backward(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    grad_total: Tensor,
    candidate_grad_total: Tensor | None,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
    mask: PositiveMask | None = None,
) -> None:
    with no_autocast(x), torch.no_grad():
        if mask is not None:
            pairs = Pairs(
                x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
            )
            gradients = _Gradients(pairs, grad_candidates is not None)
            grad = pairs.anchors.sort(grad_total, pairs.scale.dtype)
            for tile in pairs.tiles(only_positives=True):
                weights = zero_unless(
                    grad[slice(*tile.i), None].expand_as(tile.similarity), and_not(tile.same, tile.left_out)
                )
                if pairs.symmetric:
                    weights = weights + zero_unless(
                        grad[None, slice(*tile.j)].expand_as(tile.similarity),
                        and_not(tile.same_back, tile.left_out),
                    )
                gradients.add(tile, weights)
            gradients.add_to(grad_x, grad_candidates)
            return

        check_operands(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, True
        )
        # grad_x_i += scale * (g_i (C_i - c_i) + (W_i - g_i c_i)), C the class sums of rows, W of rows times g
        if candidates is None:
            others, other_labels, other_order, back = x, labels, order, grad_total
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            others, other_labels, other_order = candidates, candidate_labels, candidate_order
            back = candidate_grad_total  # type: ignore[assignment]
        sums = class_sums(others, None, other_labels, other_order)
        weighted = None if back is None else class_sums(others, back, other_labels, other_order)
        dtype = sums[0].dtype
        for at in slices(x.shape[0], ROW_CHUNK):
            g = grad_total[slice(*at)].to(dtype).unsqueeze(1)
            part = look_up(sums, labels[slice(*at)])
            own = own_candidate(x, candidates, self_index, at, dtype)
            part = part.mul_(g) if own is None else (part - own).mul_(g)
            if weighted is not None and own is not None and back is not None:
                own_back = (
                    back[slice(*at)] if self_index is None else back[self_index[slice(*at)].clamp(min=0)]
                )
                part += look_up(weighted, labels[slice(*at)]) - own * own_back.to(dtype).unsqueeze(1)
            grad_x[slice(*at)] += part * scale
        if grad_candidates is None or candidates is None:
            return

        from_anchors = class_sums(x, grad_total, labels, order)
        assert candidate_labels is not None
        total = torch.empty(candidates.shape, dtype=dtype, device=x.device)
        for at in slices(candidates.shape[0], ROW_CHUNK):
            total[slice(*at)] = look_up(from_anchors, candidate_labels[slice(*at)])
        if self_index is not None and candidates.shape[0]:
            weight = torch.where(self_index >= 0, grad_total, 0.0).to(dtype)
            own = x.to(dtype) * weight.neg().unsqueeze(1)
            if x.device.type == "cpu":
                total.index_add_(0, self_index.clamp(min=0), own)
            else:
                total.index_put_((self_index.clamp(min=0),), own, accumulate=True)
        grad_candidates += total * scale
