"""Weighted means of similarities over positives, for losses whose denominator needs no label.

With SupCon and several labels per sample the loss of an anchor is n_i - sum_j w_ij s_ij, where n_i is the
logsumexp over all other rows and s_ij = scale * x_i . c_j. This module computes the weighted mean and its
gradients; n comes from the operators. No matrix of weights is stored:

    per_label  w_ij = f_i sum_c y_ic y_jc v_c, where v_c = 1 / (rows with label c, without the anchor), and
               1 / f_i is the number of labels of the anchor that another row has. From class sums:
               m_i = scale f_i x_i . sum_c y_ic v_c (sum_j y_jc c_j - x_i), O(N C D) time, O(C D) memory.
    levels     w_lij = f_li [same class at level l], where 1 / f_li is the number of positives at level l.
               Class sums of each level by index: O(N D) time and memory.
    jaccard    w_ij = f_i J_ij with the overlaps J_ij of :mod:`pysupcon.pairs.many_labels` and
               1 / f_i = sum_j J_ij. Tile by tile.

Class sums and the products with them are computed in the dtype of the statistics (float64), so the weighted
mean of float32 rows has no rounding error of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs.custom_op import define, fake_gradients, refuse_second
from pysupcon.pairs.many_labels import LEVELS, jaccard
from pysupcon.pairs.modes import NO_FORWARD_MODE, ONCE_ONLY, is_batched, is_eager, is_transformed
from pysupcon.pairs.ops import stats_dtype, zero_gradients
from pysupcon.pairs.slicing import slices, tile_slices
from pysupcon.pairs.tiles import compute_dtype, no_autocast, readable

__all__ = ["PositiveWeights", "dense_weights", "positive_means"]

_CHUNK = 4096  # rows that are converted at a time


class PositiveWeights(NamedTuple):
    """What defines w_ij. View v of sample b is row b * V + v on either side."""

    form: str
    """"per_label", "jaccard" or "levels" """
    labels: Tensor
    """label rows, or class numbers, of the anchors' samples"""
    candidate_labels: Tensor | None
    """of the candidates' samples; None: the candidates are the anchors, and no anchor is its own candidate"""
    self_index: Tensor | None
    """int64 [M], only with candidates: the candidate that is the anchor itself; None: there is none"""
    factors: Tensor
    """f [L, M] in the dtype of the statistics, L = 1 but for levels; 0 for an anchor without a loss"""
    class_weights: Tensor | None
    """v [C] of "per_label" """
    threshold: Tensor
    """of the overlaps"""

    @property
    def leaves_out_self(self) -> bool:
        return self.candidate_labels is None or self.self_index is not None


def _chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields rows in the dtype of the statistics, some at a time."""
    dtype = stats_dtype(rows)
    for start, stop in slices(rows.shape[0], _CHUNK):
        yield slice(start, stop), rows[start:stop].to(dtype)


class _LabelSums:
    """Sums over the rows of each label, and per row the sum over its labels, by products with label rows."""

    def __init__(self, labels: Tensor, rows: int, weights: Tensor) -> None:
        self.labels, self.weights = labels, weights
        self.views = rows // max(labels.shape[0], 1)
        self.classes = labels.shape[1]

    def of(self, at: slice) -> Tensor:
        """Label rows [n, C] of some rows."""
        sample = torch.arange(at.start, at.stop, device=self.labels.device) // self.views
        return self.labels.index_select(0, sample).to(self.weights.dtype)

    def reduce(self, at: slice, rows: Tensor, into: Tensor) -> None:
        into.addmm_(self.of(at).T, rows)

    def expand(self, at: slice, sums: Tensor) -> Tensor:
        return self.of(at) @ sums

    def weight(self, at: slice) -> Tensor:
        """Sum of the class weights of each row."""
        return self.of(at) @ self.weights


class _ClassSums:
    """The same for one label per row, by index."""

    def __init__(self, number: Tensor, classes: int, views: int) -> None:
        self.number, self.classes, self.views = number, classes, views

    def of(self, at: slice) -> Tensor:
        sample = torch.arange(at.start, at.stop, device=self.number.device) // self.views
        return self.number.index_select(0, sample)

    def reduce(self, at: slice, rows: Tensor, into: Tensor) -> None:
        if into.device.type == "cpu":
            into.index_add_(0, self.of(at), rows)
        else:  # sorts, so that the order of the additions is the same in each run
            into.index_put_((self.of(at),), rows, accumulate=True)

    def expand(self, at: slice, sums: Tensor) -> Tensor:
        return sums.index_select(0, self.of(at))

    def weight(self, at: slice) -> float:
        return 1.0


_Sums = _LabelSums | _ClassSums


def _sums(weights: PositiveWeights, level: int, anchors: int, candidates: int) -> tuple[_Sums, _Sums]:
    """Returns the sums of the anchors' side and of the candidates' side."""
    others = weights.labels if weights.candidate_labels is None else weights.candidate_labels
    if weights.class_weights is not None:
        v = weights.class_weights
        return _LabelSums(weights.labels, anchors, v), _LabelSums(others, candidates, v)
    ids = torch.cat([weights.labels[:, level], others[:, level]])
    values, order = torch.sort(ids)
    new = values[1:] != values[:-1]
    rank = torch.cat([values.new_zeros(min(1, ids.shape[0])), new.cumsum(0)])
    classes = (int(rank[-1]) + 1 if ids.shape[0] else 0) if readable(ids) else ids.shape[0]
    number = torch.empty_like(rank).index_copy_(0, order, rank)
    own, other = number.split([weights.labels.shape[0], others.shape[0]])
    return tuple(  # type: ignore[return-value]
        _ClassSums(side, classes, rows // max(side.shape[0], 1))
        for side, rows in ((own, anchors), (other, candidates))
    )


def _class_means(x: Tensor, candidates: Tensor | None, weights: PositiveWeights) -> Tensor:
    """Returns m / scale, [L, M]."""
    others = x if candidates is None else candidates
    means = torch.zeros_like(weights.factors)
    for level, mean in enumerate(means):
        own, other = _sums(weights, level, x.shape[0], others.shape[0])
        sums = _reduce(other, others, None)
        if weights.class_weights is not None:
            sums *= weights.class_weights[:, None]
        for at, rows in _chunks(x):
            mean[at] = (own.expand(at, sums) * rows).sum(1)
            if weights.leaves_out_self:
                mean[at] -= own.weight(at) * rows.square().sum(1)
    return means * weights.factors


def _reduce(sums: _Sums, rows: Tensor, factors: Tensor | None) -> Tensor:
    """Returns the sums over the rows of each class, each row times its factor."""
    total = torch.zeros(sums.classes, rows.shape[1], dtype=stats_dtype(rows), device=rows.device)
    for at, chunk in _chunks(rows):
        sums.reduce(at, chunk if factors is None else chunk * factors[at, None], total)
    return total


def _class_gradients(
    x: Tensor,
    candidates: Tensor | None,
    weights: PositiveWeights,
    grad: Tensor,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
) -> None:
    """Adds the gradients of :func:`_class_means`; ``grad`` [L, M] is multiplied by the factors already."""
    others = x if candidates is None else candidates
    for level, g in enumerate(grad):
        own, other = _sums(weights, level, x.shape[0], others.shape[0])
        sums, back = _reduce(other, others, None), _reduce(own, x, g)
        if weights.class_weights is not None:
            sums *= weights.class_weights[:, None]
            back *= weights.class_weights[:, None]
        for at, rows in _chunks(x):
            part = own.expand(at, sums).mul_(g[at, None])
            if weights.leaves_out_self:
                own_part = (own.weight(at) * g[at])[:, None] * rows
                part -= own_part
                if candidates is None:  # x_i is both sides of its pair
                    part -= own_part
                elif grad_candidates is not None:
                    assert weights.self_index is not None
                    out = own_part.to(grad_candidates.dtype)
                    grad_candidates.index_add_(0, weights.self_index[at], -out)
            if candidates is None:
                part += other.expand(at, back)
            grad_x[at] += part.to(grad_x.dtype)
        if grad_candidates is not None:
            for at, _ in _chunks(others):
                grad_candidates[at] += other.expand(at, back).to(grad_candidates.dtype)


def _overlap_tiles(
    x: Tensor, candidates: Tensor | None, weights: PositiveWeights
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields tiles of the overlaps of rows, 0 for the anchor itself."""
    columns, others, dtype = x, weights.labels, compute_dtype(x)
    if candidates is not None:
        assert weights.candidate_labels is not None
        columns, others = candidates, weights.candidate_labels

    def label_rows(labels: Tensor, rows: int, at: tuple[int, int]) -> Tensor:
        views = rows // max(labels.shape[0], 1)
        return labels.index_select(0, torch.arange(*at, device=labels.device) // views)

    for i in tile_slices(x):
        own = label_rows(weights.labels, x.shape[0], i)
        for j in tile_slices(columns):
            tile = jaccard(own, label_rows(others, columns.shape[0], j), weights.threshold, dtype)
            if candidates is None and i == j:
                tile.fill_diagonal_(0.0)
            elif weights.self_index is not None:
                left_out = weights.self_index[slice(*i), None] == torch.arange(*j, device=x.device)
                tile.masked_fill_(left_out, 0.0)
            yield slice(*i), slice(*j), tile


def _overlap_means(x: Tensor, candidates: Tensor | None, weights: PositiveWeights) -> Tensor:
    dtype, others = compute_dtype(x), x if candidates is None else candidates
    mean = torch.zeros_like(weights.factors[0])
    for i, j, tile in _overlap_tiles(x, candidates, weights):
        mean[i] += (tile @ others[j].to(dtype)).mul_(x[i]).sum(1)
    return mean[None] * weights.factors


def _overlap_gradients(
    x: Tensor,
    candidates: Tensor | None,
    weights: PositiveWeights,
    grad: Tensor,
    grad_x: Tensor,
    grad_candidates: Tensor | None,
) -> None:
    dtype, others = compute_dtype(x), x if candidates is None else candidates
    g = grad[0].to(dtype)
    for i, j, tile in _overlap_tiles(x, candidates, weights):
        # Overlaps are symmetric: without candidates G_ij + G_ji = (g_i + g_j) J_ij.
        factors = g[i, None] + g[None, j] if candidates is None else g[i, None]
        tile.mul_(factors)
        grad_x[i] += tile @ others[j].to(dtype)
        if grad_candidates is not None:
            grad_candidates[j] += tile.T @ x[i].to(dtype)


def _forward_step(x: Tensor, candidates: Tensor | None, scale: Tensor, *fields: Any) -> Tensor:
    """m [L, M]"""
    weights = PositiveWeights(*fields)
    compute = _overlap_means if weights.form == "jaccard" else _class_means
    with torch.no_grad(), no_autocast(x):
        return compute(x, candidates, weights).mul_(scale)


def _backward_step(
    x: Tensor, candidates: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx, dL/dcandidates and dL/dscale; empty if not needed."""
    *fields, means, grad, needs = rest
    weights = PositiveWeights(*fields)
    add = _overlap_gradients if weights.form == "jaccard" else _class_gradients
    with torch.no_grad(), no_autocast(x):
        grad_x = zero_gradients(x)
        grad_candidates = zero_gradients(candidates) if candidates is not None and needs[1] else None
        if needs[0] or needs[1]:
            add(x, candidates, weights, grad * weights.factors * scale, grad_x, grad_candidates)
        result = (
            grad_x.to(x.dtype) if needs[0] else None,
            None if grad_candidates is None or candidates is None else grad_candidates.to(candidates.dtype),
            (grad * means).sum() / scale if needs[2] else None,
        )
    first, second, third = (x.new_empty(0) if value is None else value for value in result)
    return first, second, third


_PROBLEM = (
    "Tensor x, Tensor? candidates, Tensor scale, str form, Tensor labels, Tensor? candidate_labels"
    ", Tensor? self_index, Tensor factors, Tensor? class_weights, Tensor threshold"
)
_FORM, _DIFFERENTIABLE = 3, 3


_forward = define(
    "positive_means",
    f"({_PROBLEM}) -> Tensor",
    _forward_step,
    lambda *arguments: torch.empty_like(arguments[7]),
)
_backward = define(
    "positive_means_backward",
    f"({_PROBLEM}, Tensor means, Tensor grad, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_candidates, Tensor grad_scale)",
    _backward_step,
    fake_gradients,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.form = inputs[_FORM]
    ctx.save_for_backward(*inputs[:_FORM], *inputs[_FORM + 1 :], output)


def _backpropagate(ctx: Any, grad: Tensor | None, step: Any = None) -> tuple[Tensor | None, ...]:
    *tensors, means = ctx.saved_tensors
    arguments = *tensors[:_FORM], ctx.form, *tensors[_FORM:]
    nothing = (None,) * (len(arguments) - _DIFFERENTIABLE)
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    if grad is None:
        return *(None,) * _DIFFERENTIABLE, *nothing
    result = (step or _backward)(*arguments, means, grad, needs)
    return *(value if need else None for value, need in zip(result, needs, strict=True)), *nothing


torch.library.register_autograd("pysupcon::positive_means", _backpropagate, setup_context=_save)
torch.library.register_autograd("pysupcon::positive_means_backward", refuse_second)


class _Gradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        eager = is_eager(arguments[0]) and not is_batched(arguments[-2])
        return (_backward_step if eager else _backward)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ONCE_ONLY)


class _Means(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return (_forward_step if is_eager(arguments[0]) else _forward)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return _backpropagate(ctx, grad, step=_Gradients.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


def positive_means(x: Tensor, candidates: Tensor | None, scale: Tensor, weights: PositiveWeights) -> Tensor:
    """Computes sum_j w_ij s_ij, [L, M], differentiable once with respect to the tensors.

    Args:
        x: anchors [M, D].
        candidates: [N, D]; None: the anchors.
        scale: 1 / temperature, no dimensions, in the dtype of the statistics.
        weights: what defines w_ij.
    """
    traced = torch.compiler.is_compiling() and not is_transformed()
    means: Tensor = (_forward if traced else _Means.apply)(x, candidates, scale, *weights)
    return means


def dense_weights(weights: PositiveWeights, x: Tensor, candidates: Tensor | None) -> Tensor:
    """w_lij [L, M, N], for backend="reference"."""
    others = weights.labels if weights.candidate_labels is None else weights.candidate_labels
    columns = x.shape[0] if candidates is None else candidates.shape[0]
    own, other = (
        labels.repeat_interleave(rows // max(labels.shape[0], 1), dim=0)
        for labels, rows in ((weights.labels, x.shape[0]), (others, columns))
    )
    dtype = weights.factors.dtype
    if weights.form == LEVELS:
        dense = (own.T[:, :, None] == other.T[:, None, :]).to(dtype)
    elif weights.class_weights is None:
        dense = jaccard(own, other, weights.threshold, dtype)[None]
    else:
        dense = ((own * weights.class_weights) @ other.to(dtype).T)[None]
    index = torch.arange(x.shape[0], device=x.device) if candidates is None else weights.self_index
    if index is not None:
        left_out = index[:, None] == torch.arange(columns, device=x.device)
        dense = dense.masked_fill(left_out, 0.0)
    return dense * weights.factors[:, :, None]
