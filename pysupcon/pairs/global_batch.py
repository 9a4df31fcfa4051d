"""The batch of all processes, and the protocols through which a loss exchanges rows with other processes.

:mod:`pysupcon.distributed` implements the protocols with torch.distributed; :mod:`pysupcon.pairs.gathered`
computes the losses. Samples are numbered process after process.

Shapes: M rows of this process, S samples and N = S * V rows of all processes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pysupcon.pairs.pairing import InstanceIds, number_by_label, pair_by_id

__all__ = ["Block", "Communicator", "Gather", "GlobalBatch", "build_global_batch"]


class Block(NamedTuple):
    """Rows of the samples ``start`` to ``stop`` of the global batch."""

    start: int
    stop: int
    rows: Tensor | None
    """[(stop - start) * V, D]; None: the rows of this process"""


class Communicator(Protocol):
    """Communication of one loss call, forward and backward. Every process calls the same methods in the same
    order."""

    samples: tuple[int, ...]
    """number of samples of each process"""
    rank: int
    """rank of this process in the group"""

    def ids(self, own: Tensor) -> Tensor:
        """All-gathers ids, int64: [B] of this process -> [S]."""

    def keep(self, rows: Tensor) -> Tensor | None:
        """Receives the rows [M, D] of this process; returns what :meth:`blocks` needs until the end of the
        backward."""

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        """Yields the rows of all processes. The caller exhausts or closes the generator."""

    def exchange(self, columns: Tensor) -> Tensor:
        """All-gathers columns with one value per row: [k, M] of this process -> [k, N]."""


class Gather(Protocol):
    """Contrasts the rows of this process with those of other processes."""

    def begin(self, features: Tensor, must_match: dict[str, int]) -> Communicator | None:
        """Starts the communication of one loss call; every process calls it once per loss.

        Args:
            features: of this process, [B, V, D] or [B, D]. Number of dimensions, V, D and dtype must be the
                same on all processes.
            must_match: further values that must be the same on all processes, by name, as integers of 64 bits
                (:class:`pysupcon.pairs.agreement.Code`, which knows how to compare and show them).

        Returns:
            None if there is no other process.

        Raises:
            ValueError: a value differs; raised on every process, with the name, the values and their ranks.
        """


@dataclass(frozen=True)
class GlobalBatch:
    """Samples of all processes, those of this process included."""

    communicator: Communicator
    views: int
    """rows per sample"""
    ids: Tensor
    """int64 [S]; samples of the same id are positives: classes, or instances if there are no labels"""
    count: Tensor
    """|P_i|, int64 [N]"""
    instances: Tensor | None
    """int64 [S], ascending with the ids; None: not needed, or equal to the ids"""
    instance_count: Tensor | None
    """|A_i|, int64 [N]; None: not needed"""

    @property
    def own_samples(self) -> tuple[int, int]:
        """First and last + 1 sample of this process."""
        start = sum(self.communicator.samples[: self.communicator.rank])
        return start, start + self.communicator.samples[self.communicator.rank]

    @property
    def own_rows(self) -> slice:
        """Rows of this process."""
        start, stop = self.own_samples
        return slice(start * self.views, stop * self.views)

    @property
    def own_counts(self) -> tuple[Tensor, Tensor | None]:
        """|P_i| and |A_i| of the rows of this process."""
        instance_count = self.instance_count
        return self.count[self.own_rows], None if instance_count is None else instance_count[self.own_rows]


def build_global_batch(
    communicator: Communicator,
    features: Tensor,
    labels: Tensor | None,
    instances: Tensor | None,
    need_instances: bool,
) -> GlobalBatch:
    """Gathers the ids of all samples and counts positives.

    Args:
        communicator: of this loss call.
        features: of this process.
        labels: int64 [B] of this process; None: the positives are the rows of the same instance.
        instances: int64 [B] of this process, with the same ids on all processes; None: each sample is its own
            instance.
        need_instances: whether the loss needs |A_i|.
    """
    views = features.shape[1] if features.dim() == 3 else 1
    if instances is not None and (need_instances or labels is None):
        samples = communicator.ids(instances)
    else:
        samples = torch.arange(sum(communicator.samples), device=features.device)
    ids = samples if labels is None else communicator.ids(labels)
    count = pair_by_id(ids, views, None, 1, None)[1]
    if not need_instances:
        return GlobalBatch(communicator, views, ids, count, None, None)
    if ids is samples:
        return GlobalBatch(communicator, views, ids, count, None, count)
    samples = number_by_label(ids, None, InstanceIds(samples, None, given=True)).own
    instance_count = pair_by_id(samples, views, None, 1, None)[1]
    return GlobalBatch(communicator, views, ids, count, samples, instance_count)
