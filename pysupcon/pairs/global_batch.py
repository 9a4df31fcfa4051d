"""The batch of all processes, and the protocols through which a loss exchanges rows with other processes.

:mod:`pysupcon.distributed` implements the protocols with torch.distributed; :mod:`pysupcon.pairs.gathered`
computes the losses. Samples are numbered process after process, those of the anchors and those of separate
candidates by themselves.

Shapes: M rows of this process, S samples and N = S * V rows of all processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pysupcon.pairs.pairing import InstanceIds, count_matches, number_by_label, pair_by_id, repeat_per_view

__all__ = ["Block", "Communicator", "Gather", "GlobalBatch", "Samples", "build_global_batch"]


class Block(NamedTuple):
    """Rows of the samples ``start`` to ``stop`` of the global batch."""

    start: int
    stop: int
    rows: Tensor | None
    """[(stop - start) * V, D]; None: the rows of this process"""


class Communicator(Protocol):
    """Communication of the rows of one side of a loss call, the anchors' or the candidates', forward and
    backward. Every process calls the same methods in the same order."""

    samples: tuple[int, ...]
    """number of samples of each process"""
    rank: int
    """rank of this process in the group"""
    candidates: Communicator | None
    """of separate candidates; read only if there are any"""

    def with_views(self, views: int) -> Communicator:
        """Returns a communicator for the same samples with another number of rows each."""

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

    def begin(
        self, features: Tensor, must_match: dict[str, int], candidates: Tensor | None = None
    ) -> Communicator | None:
        """Starts the communication of one loss call; every process calls it once per loss.

        Args:
            features: of this process, [B, V, D] or [B, D]. Number of dimensions, V, D and dtype must be the
                same on all processes.
            must_match: further values that must be the same on all processes, by name, as integers of 64 bits
                (:class:`pysupcon.pairs.agreement.Code`, which knows how to compare and show them).
            candidates: of this process, [Bc, Vc, D] or [Bc, D]; passed only if there are any. Vc must be the
                same on all processes.

        Returns:
            None if there is no other process.

        Raises:
            ValueError: a value differs; raised on every process, with the name, the values and their ranks.
        """


@dataclass(frozen=True)
class Samples:
    """Samples of all processes, those of this process included, on one side: anchors or candidates."""

    communicator: Communicator
    views: int
    """rows per sample"""
    ids: Tensor
    """int64 [S]; samples of the same id are positives: classes, or instances if there are no labels"""
    instances: Tensor | None
    """int64 [S], ascending with the ids; None: not needed, or equal to the ids"""

    @property
    def own(self) -> tuple[int, int]:
        """First and last + 1 sample of this process."""
        start = sum(self.communicator.samples[: self.communicator.rank])
        return start, start + self.communicator.samples[self.communicator.rank]

    @property
    def own_rows(self) -> slice:
        """Rows of this process."""
        start, stop = self.own
        return slice(start * self.views, stop * self.views)


@dataclass(frozen=True)
class GlobalBatch:
    """Anchors and candidates of all processes."""

    anchors: Samples
    candidates: Samples | None
    """None: the anchors are the candidates"""
    first_views: bool
    """whether the anchors are the first rows of the candidates' samples"""
    count: Tensor
    """|P_i| of every anchor, int64 [N]"""
    instance_count: Tensor | None
    """|A_i| of every anchor, int64 [N]; None: not needed"""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return len(self.anchors.communicator.samples)

    @property
    def candidate_count(self) -> int:
        """|P_i| + |N_i|: number of candidates of an anchor, without the anchor."""
        if self.candidates is None:
            return self.count.shape[0] - 1
        return self.candidates.ids.shape[0] * self.candidates.views - int(self.first_views)

    @property
    def own_counts(self) -> tuple[Tensor, Tensor | None]:
        """|P_i| and |A_i| of the anchors of this process."""
        own, instance_count = self.anchors.own_rows, self.instance_count
        return self.count[own], None if instance_count is None else instance_count[own]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors for ``save_for_backward``."""
        other = self.candidates
        candidates = (None, None) if other is None else (other.ids, other.instances)
        return self.anchors.ids, self.anchors.instances, *candidates, self.count, self.instance_count

    def with_tensors(self, tensors: Sequence[Any]) -> GlobalBatch:
        """Returns the batch with other :attr:`tensors`, in the same order."""
        ids, instances, candidate_ids, candidate_instances, count, instance_count = tensors
        other = self.candidates
        if other is not None:
            other = replace(other, ids=candidate_ids, instances=candidate_instances)
        anchors = replace(self.anchors, ids=ids, instances=instances)
        return replace(self, anchors=anchors, candidates=other, count=count, instance_count=instance_count)


def build_global_batch(
    communicator: Communicator,
    features: Tensor,
    candidates: Tensor | None,
    labels: Tensor | None,
    instances: Tensor | None,
    candidate_labels: Tensor | None,
    candidate_instances: Tensor | None,
    *,
    first_views: bool,
    need_instances: bool,
) -> GlobalBatch:
    """Gathers the ids of all samples and counts positives.

    Args:
        communicator: of this loss call.
        features: of this process.
        candidates: of this process; None: the features.
        labels: int64 [B] of this process; None: the positives are the rows of the same instance.
        instances: int64 [B] of this process, with the same ids on all processes; None: each sample is its own
            instance.
        candidate_labels: int64 [Bc] of separate candidates; given if ``labels`` are.
        candidate_instances: int64 [Bc], given if ``instances`` are; None: candidate sample k of a process is
            the instance of its sample k.
        first_views: whether only the first view of each sample is an anchor (``contrast_mode="one"``).
        need_instances: whether the loss needs |A_i|.
    """
    if not need_instances and labels is not None:
        instances = candidate_instances = None
    separate = candidates is not None
    ids, samples = _gather_ids(communicator, features.device, labels, instances)
    other_ids = other_samples = None
    side = communicator
    if separate:
        assert communicator.candidates is not None
        side = communicator.candidates
        other_ids, other_samples = _gather_ids(side, features.device, candidate_labels, candidate_instances)
    numbers = InstanceIds(samples, other_samples, given=True)
    numbered = need_instances and labels is not None
    if numbered:
        numbers = number_by_label(ids, other_ids, numbers)

    views = features.shape[1] if features.dim() == 3 else 1
    first_views = first_views and views > 1
    anchors = Samples(communicator, views, ids, numbers.own if numbered else None)
    others = None
    if candidates is not None and other_ids is not None:
        candidate_views = candidates.shape[1] if candidates.dim() == 3 else 1
        others = Samples(side, candidate_views, other_ids, numbers.candidates if numbered else None)
    elif first_views:
        others = anchors
    if first_views:
        anchors = replace(anchors, communicator=communicator.with_views(1), views=1)
    first_views = first_views and not separate

    def count(own: Tensor, others_ids: Tensor | None) -> Tensor:
        if others is None:
            return pair_by_id(own, anchors.views, None, 1, None)[1]
        found = count_matches(torch.sort(own if others_ids is None else others_ids)[0], own, others.views)
        return repeat_per_view(found - int(first_views), anchors.views)

    positives = count(ids, other_ids)
    instance_count = None
    if need_instances:
        instance_count = count(numbers.own, numbers.candidates) if numbered else positives
    return GlobalBatch(anchors, others, first_views, positives, instance_count)


def _gather_ids(
    side: Communicator, device: torch.device, labels: Tensor | None, instances: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the ids of all samples of one side, and their instances: numbers of the samples if None."""
    samples = torch.arange(sum(side.samples), device=device) if instances is None else side.ids(instances)
    return samples if labels is None else side.ids(labels), samples
