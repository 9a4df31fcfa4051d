"""The operators of :mod:`pysupcon._ops` in pure PyTorch: O(N) memory, any device, any floating dtype.

Same six functions, same argument order, same results up to rounding; the contract stands in
``pysupcon/_ops.py``. This is the path of devices without a compiled kernel and of arbitrary positive masks
(:class:`PositiveMask`).

Rows are sorted by label first, so that on a CPU whole tiles are known to hold only positives, only negatives,
or nothing of interest. Without separate candidates only tiles on and above the diagonal are visited, each
serving both of its sides. Tiles are float32 (float64 for float64 input); what is kept per row is
:func:`stats_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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

Slice = tuple[int, int]
_CPU_TILE = 512  # 1 MiB of float32: a tile and its temporaries stay near the cores
_DEVICE_TILE = 4096  # enough work per launch
_ROW_CHUNK = 16384


class PositiveMask(NamedTuple):
    """Positives pair by pair: candidate row j is a positive of row i where ``mask[rows[i], columns[j]]``.

    ``mask`` is bool [S, T] (need not be symmetric), ``rows`` int64 [M], ``columns`` int64 [N]: views of one
    sample share an entry, so the mask is never expanded to rows x candidates. Labels are not looked at.
    """

    mask: Tensor
    rows: Tensor
    columns: Tensor


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything kept per row: float64 on a CPU and for float64 input, float32 otherwise."""
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(x.device.type, enabled=False)


def _slices(count: int, size: int) -> list[Slice]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


class _Side:
    """Rows of one side in label order, in the compute dtype."""

    def __init__(self, rows: Tensor, labels: Tensor, order: Tensor) -> None:
        self.order = order
        self.labels = labels.index_select(0, order)
        self.rows = rows.index_select(0, order).to(_compute_dtype(rows))
        self.tiles = _slices(rows.shape[0], _CPU_TILE if rows.device.type == "cpu" else _DEVICE_TILE)
        self.bounds: list[tuple[int, int]] | None = None
        # Reading labels on the host would make a GPU wait and cannot be traced.
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            self.bounds = [(int(self.labels[a]), int(self.labels[b - 1])) for a, b in self.tiles]

    def sort(self, column: Tensor, dtype: torch.dtype) -> Tensor:
        return column.index_select(0, self.order).to(dtype)


class _Tile(NamedTuple):
    """Pairs of anchors ``i`` (rows) and candidates ``j`` (columns); ``same`` is a bool where all agree."""

    i: Slice
    j: Slice
    similarity: Tensor
    same: Tensor | bool  # j is in the positives of i
    same_back: Tensor | bool  # i is in the positives of j
    left_out: Tensor | None  # j is i itself
    diagonal: bool  # both sides are the same rows


class _Pairs:
    """All tiles of a problem, in a fixed order."""

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        order: Tensor,
        scale: Tensor,
        candidates: Tensor | None,
        candidate_labels: Tensor | None,
        candidate_order: Tensor | None,
        self_index: Tensor | None,
        mask: PositiveMask | None,
    ) -> None:
        self.anchors = _Side(x, labels, order)
        self.symmetric = candidates is None
        if candidates is None:
            self.candidates = self.anchors
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            self.candidates = _Side(candidates, candidate_labels, candidate_order)
        self.scale = scale.to(self.anchors.rows.dtype)
        self.self_index = None if self_index is None else self_index.index_select(0, order)
        self.mask = mask

    def _relation(self, number_i: int, number_j: int) -> Tensor | bool:
        a, b = self.anchors, self.candidates
        if a.bounds is not None and b.bounds is not None:
            (first_i, last_i), (first_j, last_j) = a.bounds[number_i], b.bounds[number_j]
            if last_i < first_j or last_j < first_i:
                return False
            if first_i == last_i == first_j == last_j:
                return True
        i, j = a.tiles[number_i], b.tiles[number_j]
        return a.labels[slice(*i), None] == b.labels[None, slice(*j)]

    def _left_out(self, i: Slice, j: Slice) -> Tensor | None:
        if self.symmetric:
            if i != j:
                return None
            return torch.eye(i[1] - i[0], dtype=torch.bool, device=self.scale.device)
        if self.self_index is None:
            return None
        return self.self_index[slice(*i), None] == self.candidates.order[None, slice(*j)]

    def tiles(self, *, only_positives: bool = False, only_negatives: bool = False) -> Iterator[_Tile]:
        """``only_positives`` (``only_negatives``): leave out tiles known to hold none."""
        a, b = self.anchors, self.candidates
        for number_i, i in enumerate(a.tiles):
            scaled = a.rows[slice(*i)] * self.scale
            for number_j, j in enumerate(b.tiles):
                if self.symmetric and number_j < number_i:
                    continue
                diagonal = self.symmetric and i == j
                if self.mask is None:
                    same = same_back = self._relation(number_i, number_j)
                    if (only_positives and same is False) or (only_negatives and same is True):
                        continue
                    # An anchor and itself share a label.
                    left_out = None if same is False else self._left_out(i, j)
                else:
                    rows = self.mask.rows.index_select(0, a.order[slice(*i)])
                    columns = self.mask.columns.index_select(0, b.order[slice(*j)])
                    same = self.mask.mask[rows[:, None], columns[None, :]]
                    same_back = self.mask.mask[columns[None, :], rows[:, None]] if self.symmetric else same
                    left_out = self._left_out(i, j)
                similarity = scaled @ b.rows[slice(*j)].T
                yield _Tile(i, j, similarity, same, same_back, left_out, diagonal)


def _and_not(keep: Tensor | bool, left_out: Tensor | None) -> Tensor | bool:
    if keep is False or left_out is None:
        return keep
    return ~left_out if keep is True else keep & ~left_out


def _not(keep: Tensor | bool) -> Tensor | bool:
    return not keep if isinstance(keep, bool) else ~keep


def _zero_unless(values: Tensor, keep: Tensor | bool) -> Tensor:
    """Select after every multiplication: what is left out may be infinite."""
    return values if keep is True else torch.where(torch.as_tensor(keep, device=values.device), values, 0.0)


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
    with _no_autocast(x), torch.no_grad():
        pairs = _Pairs(
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
                    n.add(at, tile.similarity, _and_not(_not(same), tile.left_out), dim)
                if positives:
                    p.add(at, tile.similarity, _and_not(same, tile.left_out), dim)
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


def _row_stats(side: _Side, n: Tensor, p: Tensor, grad_n: Tensor, grad_p: Tensor) -> _RowStats:
    dtype = side.rows.dtype

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

    def __init__(self, pairs: _Pairs, need_candidates: bool) -> None:
        self.pairs = pairs
        self.grad_x = torch.zeros_like(pairs.anchors.rows)
        self.grad_candidates = torch.zeros_like(pairs.candidates.rows) if need_candidates else None

    def add(self, tile: _Tile, weights: Tensor) -> None:
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
    with _no_autocast(x), torch.no_grad():
        pairs = _Pairs(
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
    with _no_autocast(x), torch.no_grad():
        pairs = _Pairs(
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
                total[slice(*at)] -= _zero_unless(terms, _and_not(same, tile.left_out)).sum(dim)
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
    with _no_autocast(x), torch.no_grad():
        pairs = _Pairs(
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
            weights = _zero_unless(weights, _and_not(tile.same, tile.left_out))
            grad_n[i] += weights.sum(1)
            if back_limit is not None and back_grad is not None:
                back = torch.sigmoid(back_limit[None, j] - tile.similarity).mul_(back_grad[None, j])
                back = _zero_unless(back, _and_not(tile.same_back, tile.left_out))
                if pairs.symmetric and not tile.diagonal:
                    grad_n[j] += back.sum(0)
                weights = weights + back
            gradients.add(tile, -weights)
        gradients.add_to(grad_x, grad_candidates)
        return torch.empty_like(grad_n).index_copy_(0, order, grad_n)


def _class_sums(rows: Tensor, weights: Tensor | None, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (weighted) rows per label: entry k of the table belongs to the label whose run starts at k.

    Returns the table [N, D] and the sorted labels [N] through which :func:`_look_up` finds an entry.
    """
    sorted_labels = labels.index_select(0, order)
    dtype = torch.float64 if rows.device.type in ("cpu", "cuda") else _compute_dtype(rows)
    first = torch.searchsorted(sorted_labels, sorted_labels)
    table = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
    for start, stop in _slices(rows.shape[0], _ROW_CHUNK):
        at = order[start:stop]
        part = rows.index_select(0, at).to(dtype)
        if weights is not None:
            part *= weights.index_select(0, at).to(dtype).unsqueeze(1)
        if rows.device.type == "cpu":
            table.index_add_(0, first[start:stop], part)
        else:  # sorted, hence reproducible, where index_add_ would use atomics
            table.index_put_((first[start:stop],), part, accumulate=True)
    return table, sorted_labels


def _look_up(sums: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    table, sorted_labels = sums
    if not table.shape[0]:
        return table.new_zeros((labels.shape[0], table.shape[1]))
    at = torch.searchsorted(sorted_labels, labels).clamp_(max=table.shape[0] - 1)
    found = sorted_labels.index_select(0, at) == labels
    return table.index_select(0, at).mul_(found.unsqueeze(1))


def _own_candidate(
    x: Tensor, candidates: Tensor | None, self_index: Tensor | None, at: Slice, dtype: torch.dtype
) -> Tensor | None:
    """The candidate row that is anchor i, zero where there is none."""
    if candidates is None:
        return x[slice(*at)].to(dtype)
    if self_index is None or not candidates.shape[0]:
        return None
    index = self_index[slice(*at)]
    return candidates.index_select(0, index.clamp(min=0)).to(dtype).mul_((index >= 0).unsqueeze(1))


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
    with _no_autocast(x), torch.no_grad():
        total = torch.zeros(x.shape[0], dtype=stats_dtype(x), device=x.device)
        if mask is not None:
            pairs = _Pairs(
                x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
            )
            for tile in pairs.tiles(only_positives=True):
                both = [(tile.i, tile.same, 1)]
                if pairs.symmetric and not tile.diagonal:
                    both.append((tile.j, tile.same_back, 0))
                for at, same, dim in both:
                    total[slice(*at)] += _zero_unless(tile.similarity, _and_not(same, tile.left_out)).sum(dim)
            return torch.empty_like(total).index_copy_(0, order, total)
        if candidates is None:
            sums = _class_sums(x, None, labels, order)
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            sums = _class_sums(candidates, None, candidate_labels, candidate_order)
        for at in _slices(x.shape[0], _ROW_CHUNK):
            part = _look_up(sums, labels[slice(*at)])
            own = _own_candidate(x, candidates, self_index, at, part.dtype)
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
    with _no_autocast(x), torch.no_grad():
        if mask is not None:
            pairs = _Pairs(
                x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask
            )
            gradients = _Gradients(pairs, grad_candidates is not None)
            grad = pairs.anchors.sort(grad_total, pairs.scale.dtype)
            for tile in pairs.tiles(only_positives=True):
                weights = _zero_unless(
                    grad[slice(*tile.i), None].expand_as(tile.similarity), _and_not(tile.same, tile.left_out)
                )
                if pairs.symmetric:
                    weights = weights + _zero_unless(
                        grad[None, slice(*tile.j)].expand_as(tile.similarity),
                        _and_not(tile.same_back, tile.left_out),
                    )
                gradients.add(tile, weights)
            gradients.add_to(grad_x, grad_candidates)
            return

        # grad_x_i += scale * (g_i (C_i - c_i) + (W_i - g_i c_i)), C the class sums of rows, W of rows times g
        if candidates is None:
            others, other_labels, other_order, back = x, labels, order, grad_total
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            others, other_labels, other_order = candidates, candidate_labels, candidate_order
            back = candidate_grad_total  # type: ignore[assignment]
        sums = _class_sums(others, None, other_labels, other_order)
        weighted = None if back is None else _class_sums(others, back, other_labels, other_order)
        dtype = sums[0].dtype
        for at in _slices(x.shape[0], _ROW_CHUNK):
            g = grad_total[slice(*at)].to(dtype).unsqueeze(1)
            part = _look_up(sums, labels[slice(*at)])
            own = _own_candidate(x, candidates, self_index, at, dtype)
            part = part.mul_(g) if own is None else (part - own).mul_(g)
            if weighted is not None and own is not None and back is not None:
                own_back = (
                    back[slice(*at)] if self_index is None else back[self_index[slice(*at)].clamp(min=0)]
                )
                part += _look_up(weighted, labels[slice(*at)]) - own * own_back.to(dtype).unsqueeze(1)
            grad_x[slice(*at)] += part * scale
        if grad_candidates is None or candidates is None:
            return

        from_anchors = _class_sums(x, grad_total, labels, order)
        assert candidate_labels is not None
        total = torch.empty(candidates.shape, dtype=dtype, device=x.device)
        for at in _slices(candidates.shape[0], _ROW_CHUNK):
            total[slice(*at)] = _look_up(from_anchors, candidate_labels[slice(*at)])
        if self_index is not None and candidates.shape[0]:
            weight = torch.where(self_index >= 0, grad_total, 0.0).to(dtype)
            own = x.to(dtype) * weight.neg().unsqueeze(1)
            if x.device.type == "cpu":
                total.index_add_(0, self_index.clamp(min=0), own)
            else:
                total.index_put_((self_index.clamp(min=0),), own, accumulate=True)
        grad_candidates += total * scale


def positive_count(mask: PositiveMask, self_index: Tensor | None, symmetric: bool) -> Tensor:
    """|P_i| under a mask, int64 [M]. ``symmetric``: the candidates are the anchors."""
    # The columns of one sample share an entry: count each sample once, by how many rows it has.
    rows_of = torch.zeros(mask.mask.shape[1], dtype=torch.float64, device=mask.mask.device)
    rows_of.index_add_(0, mask.columns, torch.ones_like(mask.columns, dtype=torch.float64))
    per_sample = torch.cat(
        [mask.mask[a:b].to(torch.float64) @ rows_of for a, b in _slices(mask.mask.shape[0], 256)]
        or [rows_of.new_zeros(0)]
    )
    count = per_sample.index_select(0, mask.rows).to(torch.int64)
    if symmetric:
        return count - mask.mask[mask.rows, mask.columns].to(torch.int64)
    if self_index is None:
        return count
    own = mask.mask[mask.rows, mask.columns[self_index.clamp(min=0)]]
    return count - (own & (self_index >= 0)).to(torch.int64)
