"""Pairs of rows as pytorch-metric-learning lists them (``indices_tuple``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.compat.arguments import check_tensor
from pysupcon.pairs.checks import describe
from pysupcon.pairs.modes import is_eager

__all__ = ["ListedPairs"]

_CHUNK = 1 << 20
"""Pairs that are checked at a time"""


class ListedPairs(NamedTuple):
    """Pairs of an anchor and a reference, int64, each [number of pairs]."""

    anchors: Tensor
    positives: Tensor
    negative_anchors: Tensor
    negatives: Tensor
    rows: int
    columns: int

    @staticmethod
    def read(value: Any, rows: int, columns: int, device: torch.device) -> ListedPairs:
        """Reads an ``indices_tuple`` of ``rows`` anchors and ``columns`` references."""
        text = (
            "indices_tuple must be 4 tensors (anchors, positives, anchors, negatives) or 3 (anchors, "
            "positives, negatives) of integers"
        )
        if not isinstance(value, (tuple, list)) or len(value) not in (3, 4):
            raise TypeError(f"{text}, got {describe(value)}")
        for part in value:
            check_tensor("each of indices_tuple", part, "[number of pairs]")
            if part.dim() != 1 or (part.is_floating_point() and part.numel()) or part.is_complex():
                raise TypeError(f"{text}, got {describe(part)}")
        a, p, b, n = (
            part.to(device).long() for part in (value if len(value) == 4 else (*value[:2], *value[::2]))
        )
        if len(a) != len(p) or len(b) != len(n):
            raise ValueError(f"{text} of equal length, got lengths {[len(part) for part in value]}")
        if device.type == "cpu" and is_eager(a):
            for part, size in ((a, rows), (p, columns), (b, rows), (n, columns)):
                low, high = (int(part.min()), int(part.max())) if part.numel() else (0, -1)
                if low < 0 or high >= size:
                    raise ValueError(
                        f"indices_tuple must hold numbers from 0 to {size - 1}, got {low} to {high}"
                    )
        return ListedPairs(a, p, b, n, rows, columns)

    def to_sets(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The positives and the negatives as bool [rows, columns]."""
        positives, negatives = (torch.zeros_like(s, dtype=torch.bool) for _ in range(2))
        positives[self.anchors, self.positives] = True
        negatives[self.negative_anchors, self.negatives] = True
        if s.device.type == "cpu" and is_eager(s) and bool((positives & negatives).any()):
            raise ValueError("indices_tuple must not list a pair as positive and as negative")
        return positives, negatives

    def find_left_out(self, labels: Tensor, others: Tensor) -> tuple[bool, Tensor | None]:
        """Finds the pairs that the labels imply and that are not listed.

        Returns:
            Whether the pairs are all of them, or all but one positive per anchor; and this one, int64
            [rows], or None.
        """
        a, p, b, n, rows, columns = self
        ids, order = torch.sort(others)
        end, start = (torch.searchsorted(ids, labels, right=right) for right in (True, False))
        missing = end - start - torch.bincount(a, minlength=rows)
        if not rows or len(b) + int((end - start).sum()) != rows * columns:
            return False, None
        fewest, most = int(missing.min()), int(missing.max())
        if fewest != most or most not in (0, 1):
            return False, None
        total = torch.cat([order.new_zeros(1), order.cumsum(0)])
        left_out = total[end] - total[start]
        for anchors, references, equal in ((a, p, True), (b, n, False)):
            last = -1
            for i, j in zip(anchors.split(_CHUNK), references.split(_CHUNK), strict=True):
                number = i * columns + j
                ascending = (number[1:] > number[:-1]).all()  # no pair twice
                agrees = ((labels[i] == others[j]) == equal).all()
                if len(i) and (int(number[0]) <= last or not bool(agrees & ascending)):
                    return False, None
                last = int(number[-1]) if len(i) else last
                if equal:
                    left_out.index_add_(0, i, j, alpha=-1)
        return True, left_out if most else None
