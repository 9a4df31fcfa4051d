"""Arguments of the operators for the rows of this process against a block of the global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysupcon.pairs.global_batch import Block, GlobalBatch, Samples
from pysupcon.pairs.pairing import repeat_per_view, sort_rows
from pysupcon.pairs.statistics import Operands, Pairing, memory_operands, operands

__all__ = ["BlockPairing"]


class BlockPairing:
    """Arguments of the operators for each block. Each block is sorted once per pass.

    Args:
        batch: of all processes.
        negatives: whether the loss needs negatives.
    """

    def __init__(self, batch: GlobalBatch, negatives: bool) -> None:
        self.batch, self.negatives = batch, negatives
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

    def of_block(
        self, own: Samples, other: Samples, rows: Tensor, scale: Tensor, block: Block, with_others: bool
    ) -> Operands:
        """Returns the arguments for the own rows of one side against a block of the same or the other side.

        Args:
            own: side of the own rows.
            other: side of the block.
            rows: own rows.
            scale: 1 / temperature.
            block: of the other side.
            with_others: whether the rows of the block are anchors, too, so that the own rows have weights as
                their candidates.
        """
        labels, order, instances = self._side(own, *own.own)
        weights = None if own.log_weights is None else own.log_weights[own.own_rows]
        if block.rows is None:
            pairing = Pairing(labels, order, instances=instances, log_weights=weights)
        else:
            other_labels, other_order, other_instances = self._side(other, block.start, block.stop)
            other_weights = other.log_weights
            if other_weights is not None:
                other_weights = other_weights[block.start * other.views : block.stop * other.views]
            pairing = Pairing(
                labels, order, other_labels, other_order,
                self._self_index(own, other, rows.shape[0], block, rows.device), instances, other_instances,
                weights if with_others else None, other_weights,
            )  # fmt: skip
        first = operands(rows, block.rows, scale, pairing)
        return Operands(first, pairing, self.negatives and self.batch.batch_negatives, {})

    def of_memory(self, rows: Tensor, scale: Tensor) -> list[Operands]:
        """Returns the arguments for the own anchors against the memory of this process, if there are both."""
        memory, anchors = self.batch.memory, self.batch.anchors
        if memory is None or not rows.shape[0]:
            return []
        return [memory_operands(rows, scale, self._side(anchors, *anchors.own), memory, self.negatives)]
