"""Index arguments of the operators for the rows of this process against a block of rows of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.global_batch import Block, GlobalBatch, Samples
from pysupcon.pairs.pairing import repeat_per_view, sort_rows

__all__ = ["BlockPairing"]


class BlockPairing:
    """Index arguments for the blocks of one global batch. Each block is sorted once.

    Args:
        batch: of all processes.
    """

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        self._sides: dict[tuple[bool, int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def _side(self, samples: Samples, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels, order and instances of the rows of samples ``start`` to ``stop``."""
        key = samples is self.batch.candidates, start, stop
        if key not in self._sides:
            ids, views, instances = samples.ids[start:stop], samples.views, samples.instances
            if instances is not None:
                instances = instances[start:stop]  # ascending with the ids
            order = sort_rows(ids if instances is None else instances, views)[1]
            rows = None if instances is None else repeat_per_view(instances, views)
            self._sides[key] = repeat_per_view(ids, views), order, rows
        return self._sides[key]

    def _self_index(self, own: Samples, other: Samples, count: int, block: Block, device: Any) -> Tensor:
        """Returns the row of a block that is the same row as each of the ``count`` own rows, or -1."""
        index = torch.full((count,), -1, dtype=torch.int64, device=device)
        start, stop = own.own
        if block.start <= start and stop <= block.stop and (own is other or self.batch.first_views):
            first = start - block.start
            if own is other:
                torch.arange(first * own.views, first * own.views + count, out=index)
            else:  # view 0 of each sample is on both sides
                step = other.views
                index[:: own.views] = torch.arange(
                    first * step, (first + stop - start) * step, step, device=device
                )
        return index

    def operands(
        self, own: Samples, other: Samples, rows: Tensor, scale: Tensor, block: Block
    ) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
        """Returns the first eight arguments of the operators, for the own rows of one side against a block of
        the same or the other side, and the instances of both."""
        *own_side, instances = self._side(own, *own.own)
        if block.rows is None:
            return (rows, *own_side, scale, None, None, None, None), (instances, None)
        *block_side, block_instances = self._side(other, block.start, block.stop)
        self_index = self._self_index(own, other, rows.shape[0], block, rows.device)
        return (rows, *own_side, scale, block.rows, *block_side, self_index), (instances, block_instances)
