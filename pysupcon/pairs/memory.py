"""Rows that the anchors are contrasted with in addition to the batch: a memory bank or a queue.

The memory gets no gradient. Rows that must not be contrasted with (empty slots, rows of the batch, rows of an
ignored label) keep their place, because their number is not known without waiting for a GPU: they get weight
0 and a class of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysupcon.pairs.checks import check_features, check_ids, check_row_weights, describe
from pysupcon.pairs.pairing import unused_id
from pysupcon.pairs.sides import Side, get_log_weights

__all__ = ["NO_ID", "MemoryArguments", "MemoryRows", "check_memory"]


NO_ID = torch.iinfo(torch.int64).min
"""Label or instance of the rows of a queue that were stored without one. It matches no id of a batch."""


class MemoryArguments(NamedTuple):
    """The arguments of a loss that describe the memory."""

    rows: Any
    labels: Any
    instances: Any
    weights: Any
    exclude_batch: bool


class MemoryRows(NamedTuple):
    """A checked memory of Nm rows."""

    rows: Tensor
    """[Nm, D], without gradient"""
    labels: Tensor | None
    """int64 [Nm]; None: the loss has no labels"""
    instances: Tensor | None
    """int64 [Nm]; None: no row is a view of a sample of the batch"""
    weights: Tensor | None
    """[Nm], at least 0, which means "not a candidate"; None: all are 1"""
    weighted: bool
    """whether there are weights other than 0 and 1"""
    of_queue: bool
    """whether the ids may be :data:`NO_ID`"""

    @property
    def candidate_count(self) -> int | Tensor:
        """Number of rows that are candidates."""
        return self.rows.shape[0] if self.weights is None else (self.weights > 0).sum()

    def exclude(self, excluded: Tensor) -> MemoryRows:
        """Gives weight 0 to the rows of a mask, bool [Nm]."""
        weights = self.rows.new_ones(excluded.shape) if self.weights is None else self.weights
        return self._replace(weights=torch.where(excluded, 0.0, weights))

    def side(self, ids: Tensor, instances: Tensor | None, labelled: bool, dtype: torch.dtype) -> Side:
        """Returns the side of the memory.

        Args:
            ids: of the samples of the batch, of anchors and candidates: their labels, or instances if there
                are no labels.
            instances: of the anchors' samples; None: not needed.
            labelled: whether ``ids`` are labels.
            dtype: of log weights.
        """
        log_weights = None if self.weights is None else get_log_weights(self.weights, None, dtype)
        return Side(
            self._matching(ids, self.labels if labelled else self.instances),
            None if instances is None else self._matching(instances, self.instances),
            1,
            log_weights,
        )

    def _matching(self, of_batch: Tensor, own: Tensor | None) -> Tensor:
        """Returns ids to compare with those of the batch; rows without an id, or of weight 0, match none."""
        unused = unused_id(of_batch)
        if own is None:
            return unused.expand(self.rows.shape[0]).contiguous()
        if self.of_queue:
            own = torch.where(own == NO_ID, unused, own)
        return own if self.weights is None else torch.where(self.weights > 0, own, unused)


def check_memory(
    given: MemoryArguments, features: Tensor, labelled: bool, instances: Tensor | None
) -> MemoryRows | None:
    """Checks the memory of a loss.

    Args:
        given: the arguments.
        features: of the batch, checked.
        labelled: whether the batch has labels.
        instances: of the batch; None: not given.

    Returns:
        :class:`MemoryRows`; None if there is no memory.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value, or arguments do not fit together.
    """
    rows, labels, own_instances, weights, exclude_batch = given
    if not isinstance(exclude_batch, bool):
        raise TypeError(f"exclude_batch_from_memory must be True or False, got {describe(exclude_batch)}")
    weighted, of_queue = weights is not None, False
    if rows is None:
        for name, value in (("memory_labels", labels), ("memory_instances", own_instances)):
            if value is not None:
                raise ValueError(f"{name} needs memory")
        if weights is not None or exclude_batch:
            raise ValueError("memory_weights and exclude_batch_from_memory need memory")
        return None
    if not isinstance(rows, Tensor) and all(hasattr(rows, name) for name in ("rows", "labels", "weights")):
        if labels is not None or own_instances is not None or weights is not None:
            raise ValueError(
                "a MemoryQueue brings its own labels, instances and weights: memory_labels, memory_instances "
                "and memory_weights must be None"
            )
        queue, rows = rows, rows.rows
        labels, weights = queue.labels if labelled else None, queue.weights
        own_instances = queue.instances if instances is not None else None
        weighted, of_queue = False, True
    check_features("memory", rows, like=features)
    if rows.dim() != 2:
        raise ValueError(f"memory must be rows of shape [N, D], got {describe(rows)}")
    if rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("memory gets no gradient: pass memory.detach(), or candidates if it needs one")
    if labelled and labels is None:
        raise ValueError("memory_labels must be given when labels and memory are")
    if not labelled and labels is not None:
        raise ValueError("memory_labels were given without labels: give both or neither")
    if own_instances is not None and instances is None:
        raise ValueError("memory_instances were given without instances: give both or neither")
    if exclude_batch and own_instances is None:
        raise ValueError("exclude_batch_from_memory needs instances and memory_instances")
    return MemoryRows(
        rows.detach(),
        None if labels is None else check_ids("memory_labels", labels, rows),
        None if own_instances is None else check_ids("memory_instances", own_instances, rows),
        None if weights is None else check_row_weights("memory_weights", weights, rows, zero=True),
        weighted,
        of_queue,
    )
