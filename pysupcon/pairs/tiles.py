"""Checks of operator arguments, and tiles of the pairs of rows in label order, for the tiled operators.

Rows are sorted by label first. On a CPU this shows which tiles contain only positives or only negatives, and
which can be skipped. Without separate candidates only tiles on and above the diagonal are visited, each for
both of its sides. Tiles are float32 (float64 for float64 rows); values per row are in
:func:`pysupcon.pairs.ops.stats_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs.many_labels import shares_labels
from pysupcon.pairs.ops import stats_dtype
from pysupcon.pairs.slicing import Slice, slices, tile_slices

_NEVER = 1e30  # minus the logarithm of a weight 0, where infinity would give NaN


class PositiveMask(NamedTuple):
    """Positives by pair: candidate row j is a positive of row i if ``mask[rows[i], columns[j]]``.

    ``mask`` is bool [S, T] (need not be symmetric), ``rows`` int64 [M], ``columns`` int64 [N]. Views of one
    sample share an entry, so the mask is never expanded to rows x candidates. Labels are ignored.

    With a ``threshold``, ``mask`` holds label rows instead, uint8 [S, C], and row j is a positive of row i if
    the overlap of label rows ``rows[i]`` and ``columns[j]`` is above it (:mod:`pysupcon.pairs.many_labels`).
    """

    mask: Tensor
    rows: Tensor
    columns: Tensor
    threshold: Tensor | None = None

    def relation(self, anchors: Tensor, candidates: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """Decides for a tile of rows, given by index, which candidates j are positives of anchors i.

        Returns:
            bool [I, J]; and, if ``symmetric``, whether i is a positive of j.
        """
        rows, columns = self.rows.index_select(0, anchors), self.columns.index_select(0, candidates)
        if self.threshold is not None:
            a, b = self.mask.index_select(0, rows), self.mask.index_select(0, columns)
            same = shares_labels(a, b, self.threshold)
            return same, same
        same = self.mask[rows[:, None], columns[None, :]]
        return same, self.mask[columns[None, :], rows[:, None]] if symmetric else same


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def readable(tensor: Tensor) -> bool:
    """Whether the host may read values: reading blocks on a GPU, and cannot be traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_index(name: str, index: Tensor, rows: Tensor) -> None:
    if index.dtype != torch.int64 or index.shape != rows.shape[:1] or index.device != rows.device:
        raise ValueError(
            f"{name} must be int64 of shape [{rows.shape[0]}] on {rows.device}, got {index.dtype} of shape "
            f"{list(index.shape)} on {index.device}"
        )


def _check_order(prefix: str, labels: Tensor, order: Tensor, labelled: bool) -> None:
    rows = order.shape[0]
    name = f"{prefix}order"
    seen = torch.zeros(rows, dtype=torch.bool, device=order.device)
    try:
        in_order = labels.index_select(0, order)  # raises for indices out of range
        once = bool(seen.index_fill_(0, order, True).all())
    except IndexError:
        once = False
    if not once:
        raise ValueError(f"{name} must hold each of 0 to {rows - 1} once")
    if labelled and (in_order[1:] < in_order[:-1]).any():
        raise ValueError(f"{name} must be the argsort of {prefix}labels")


def check_operands(
    x: Tensor,
    labels: Tensor,
    order: Tensor,
    scale: Tensor,
    candidates: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_order: Tensor | None,
    self_index: Tensor | None,
    labelled: bool,
) -> None:
    """Checks the first eight arguments of an operator. Values are checked only on a CPU.

    Args:
        x: and all arguments up to ``self_index``: see :mod:`pysupcon.pairs.ops`.
        labelled: whether labels define the positives; False with a mask.

    Raises:
        ValueError: naming the argument.
    """
    if torch.compiler.is_compiling():
        return
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating-point of shape [rows, D] with D at least 1, got {x.dtype} of shape "
            f"{list(x.shape)}"
        )
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            f"scale must be a floating-point tensor of no dimensions, got {scale.dtype} of shape "
            f"{list(scale.shape)}"
        )
    if readable(scale) and not 0 < float(scale) < torch.inf:
        raise ValueError(f"scale must be finite and greater than 0, got {float(scale)}")
    if candidates is None and not (candidate_labels is candidate_order is self_index is None):
        raise ValueError("candidate_labels, candidate_order and self_index go with candidates")
    sides = [("", x, labels, order)]
    if candidates is not None:
        if candidate_labels is None or candidate_order is None:
            raise ValueError("candidates need candidate_labels and candidate_order")
        if candidates.shape[1:] != x.shape[1:] or candidates.dtype != x.dtype:
            raise ValueError(
                f"candidates must be {x.dtype} of shape [N, {x.shape[1]}] as x is, got {candidates.dtype} of "
                f"shape {list(candidates.shape)}"
            )
        sides.append(("candidate_", candidates, candidate_labels, candidate_order))
    for prefix, rows, side_labels, side_order in sides:
        _check_index(f"{prefix}labels", side_labels, rows)
        _check_index(f"{prefix}order", side_order, rows)
        if readable(side_order) and rows.shape[0]:
            _check_order(prefix, side_labels, side_order, labelled)
    if self_index is None or candidates is None or candidate_labels is None:
        return
    _check_index("self_index", self_index, x)
    if readable(self_index) and self_index.numel():
        count = candidates.shape[0]
        if int(self_index.min()) < -1 or int(self_index.max()) >= count:
            raise ValueError(f"self_index must lie in [-1, {count})")
        present = self_index >= 0
        if labelled and (candidate_labels[self_index[present]] != labels[present]).any():
            raise ValueError("self_index must name a candidate of the anchor's own label")


def _check_weights(prefix: str, rows: Tensor | None, log_weights: Tensor | None) -> None:
    if log_weights is None:
        return
    if rows is None:
        raise ValueError("candidate_log_weights go with candidates")
    if not log_weights.is_floating_point() or log_weights.shape != rows.shape[:1]:
        raise ValueError(
            f"{prefix}log_weights must be floating-point of shape [{rows.shape[0]}], got {log_weights.dtype} "
            f"of shape {list(log_weights.shape)}"
        )
    if readable(log_weights):
        bad = ~((log_weights.abs() <= 1e14) | (log_weights == -torch.inf))
        if bad.any():
            raise ValueError(
                f"{prefix}log_weights must lie between -1e14 and 1e14 or be -inf, got "
                f"{log_weights[bad][0].item()}"
            )


class Side:
    """Rows of one side in label order, in the compute dtype."""

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor,
        order: Tensor,
        instances: Tensor | None,
        log_weights: Tensor | None,
    ) -> None:
        self.order = order
        self.instances = None if instances is None else instances.index_select(0, order)
        self.labels = labels.index_select(0, order)
        self.rows = rows.index_select(0, order).to(compute_dtype(rows))
        self.tiles = tile_slices(rows)
        self.bounds: list[tuple[int, int]] | None = None
        if readable(rows):
            self.bounds = [(int(self.labels[a]), int(self.labels[b - 1])) for a, b in self.tiles]
        self.top_weight: Tensor | None = None
        """the largest log weight; 0 if all are -inf"""
        self._log_weights: Tensor | None = None
        if log_weights is not None:
            self._log_weights = self.sort(log_weights, stats_dtype(rows))
            top = self._log_weights.amax() if log_weights.numel() else log_weights.new_zeros(())
            self.top_weight = torch.where(top == -torch.inf, 0.0, top).to(self._log_weights.dtype)

    def weights(self, at: Slice, dim: int) -> Tensor | None:
        """Log weights of some rows relative to the largest, so that a float32 keeps their digits."""
        if self._log_weights is None or self.top_weight is None:
            return None
        return (self._log_weights[slice(*at)] - self.top_weight).to(self.rows.dtype).unsqueeze(dim)

    def absolute_weights(self, at: Slice, dim: int) -> Tensor | None:
        """Log weights of some rows; a finite number instead of -inf."""
        if self._log_weights is None:
            return None
        return self._log_weights[slice(*at)].clamp(min=-_NEVER).to(self.rows.dtype).unsqueeze(dim)

    def check(self, *columns: Tensor) -> None:
        """Checks statistics of the rows, or their gradients."""
        for column in columns:
            if column.shape != self.order.shape or not column.is_floating_point():
                raise ValueError(
                    "statistics and their gradients must be floating-point of shape "
                    f"{list(self.order.shape)}, got {column.dtype} of shape {list(column.shape)}"
                )

    def sort(self, column: Tensor, dtype: torch.dtype) -> Tensor:
        self.check(column)
        return column.index_select(0, self.order).to(dtype)


class Tile(NamedTuple):
    """Pairs of anchors ``i`` (rows) and candidates ``j`` (columns).

    A relation is a bool if it is the same for all pairs of the tile.
    """

    i: Slice
    j: Slice
    similarity: Tensor
    same: Tensor | bool  # j is in the positives of i
    same_back: Tensor | bool  # i is in the positives of j
    left_out: Tensor | None  # j is i itself
    instance: Tensor | bool  # j is in A_i, and i in A_j; False without instances
    diagonal: bool  # both sides are the same rows


class Pairs:
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
        instances: Tensor | None = None,
        candidate_instances: Tensor | None = None,
        log_weights: Tensor | None = None,
        candidate_log_weights: Tensor | None = None,
        column_side: bool = False,
    ) -> None:
        check_operands(
            x, labels, order, scale, candidates, candidate_labels, candidate_order, self_index, mask is None
        )
        if instances is not None:
            _check_index("instances", instances, x)
        if candidate_instances is not None and candidates is not None:
            _check_index("candidate_instances", candidate_instances, candidates)
        if log_weights is not None and candidates is not None and not column_side:
            raise ValueError("with candidates, log_weights go with the candidates' own statistics")
        _check_weights("", x, log_weights)
        _check_weights("candidate_", candidates, candidate_log_weights)
        self.anchors = Side(x, labels, order, instances, log_weights)
        self.symmetric = candidates is None
        if candidates is None:
            self.candidates = self.anchors
        else:
            assert candidate_labels is not None
            assert candidate_order is not None
            self.candidates = Side(
                candidates, candidate_labels, candidate_order, candidate_instances, candidate_log_weights
            )
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

    def _instance(self, i: Slice, j: Slice, same: Tensor | bool) -> Tensor | bool:
        a, b = self.anchors.instances, self.candidates.instances
        if a is None or b is None or same is False:
            return False
        alike = a[slice(*i), None] == b[None, slice(*j)]
        return alike if same is True or self.mask is not None else alike & same

    def _left_out(self, i: Slice, j: Slice) -> Tensor | None:
        if self.symmetric:
            if i != j:
                return None
            return torch.eye(i[1] - i[0], dtype=torch.bool, device=self.scale.device)
        if self.self_index is None:
            return None
        return self.self_index[slice(*i), None] == self.candidates.order[None, slice(*j)]

    def tiles(self, *, only_positives: bool = False, only_negatives: bool = False) -> Iterator[Tile]:
        """Yields all tiles; ``only_positives`` (``only_negatives``) skips tiles known to contain none."""
        a, b = self.anchors, self.candidates
        for number_i, i in enumerate(a.tiles):
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
                    anchors, candidates = a.order[slice(*i)], b.order[slice(*j)]
                    same, same_back = self.mask.relation(anchors, candidates, self.symmetric)
                    left_out = self._left_out(i, j)
                similarity = (a.rows[slice(*i)] @ b.rows[slice(*j)].T).mul_(self.scale)
                if diagonal:  # s_ij and s_ji must be equal: rounded differently, they would not cancel
                    similarity = similarity.triu() + similarity.triu(1).T
                instance = self._instance(i, j, same)
                yield Tile(i, j, similarity, same, same_back, left_out, instance, diagonal)


def and_not(keep: Tensor | bool, left_out: Tensor | None) -> Tensor | bool:
    if keep is False or left_out is None:
        return keep
    return ~left_out if keep is True else keep & ~left_out


def negated(keep: Tensor | bool) -> Tensor | bool:
    return not keep if isinstance(keep, bool) else ~keep


def zero_unless(values: Tensor, keep: Tensor | bool) -> Tensor:
    """Selects values. Callers select after multiplying, because the other values may be infinite."""
    return values if keep is True else torch.where(torch.as_tensor(keep, device=values.device), values, 0.0)


def positive_count(mask: PositiveMask, self_index: Tensor | None, symmetric: bool) -> Tensor:
    """Counts the positives of each anchor under a mask, int64 [M].

    Args:
        mask: of all pairs.
        self_index: int64 [M], the candidate row that is the anchor itself, -1 for none; None: none is.
        symmetric: whether the candidates are the anchors.
    """
    # The columns of one sample share an entry: each sample is counted once, weighted by its rows.
    rows_of = torch.zeros(mask.mask.shape[1], dtype=torch.float64, device=mask.mask.device)
    rows_of.index_add_(0, mask.columns, torch.ones_like(mask.columns, dtype=torch.float64))
    per_sample = torch.cat(
        [mask.mask[a:b].to(torch.float64) @ rows_of for a, b in slices(mask.mask.shape[0], 256)]
        or [rows_of.new_zeros(0)]
    )
    count = per_sample.index_select(0, mask.rows).to(torch.int64)
    if symmetric:
        return count - mask.mask[mask.rows, mask.columns].to(torch.int64)
    if self_index is None:
        return count
    own = mask.mask[mask.rows, mask.columns[self_index.clamp(min=0)]]
    return count - (own & (self_index >= 0)).to(torch.int64)
