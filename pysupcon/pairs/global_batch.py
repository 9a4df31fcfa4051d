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

from pysupcon.pairs.pairing import count_matches, number_pairs, pair_by_id, repeat_per_view, sort_rows
from pysupcon.pairs.sides import Side
from pysupcon.pairs.statistics import Memory

__all__ = [
    "AnchorCounts",
    "Block",
    "Communicator",
    "Further",
    "Gather",
    "GlobalBatch",
    "Samples",
    "build_global_batch",
    "gather_sides",
]


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
        """All-gathers columns with one value per row: [k, M] of this process -> [k, N], of any dtype."""


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
    log_weights: Tensor | None = None
    """[S * V] as candidates; None: all are 0, or the samples are not candidates"""

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


class AnchorCounts(NamedTuple):
    """Sizes of the sets of anchors."""

    positives: Tensor
    """|P_i|, int64"""
    instances: Tensor | None
    """|A_i|, int64; None: not needed"""
    candidates: int | Tensor
    """|P_i| + |N_i|, without the anchor: one number for all anchors, or int64"""

    def of(self, rows: slice) -> AnchorCounts:
        """Selects anchors."""
        positives, instances, candidates = self
        return AnchorCounts(
            positives[rows],
            None if instances is None else instances[rows],
            candidates[rows] if isinstance(candidates, Tensor) and candidates.dim() else candidates,
        )


@dataclass(frozen=True)
class GlobalBatch:
    """Anchors and candidates of all processes, and the memory of this process."""

    anchors: Samples
    candidates: Samples | None
    """None: the anchors are the candidates"""
    first_views: bool
    """whether the anchors are the first rows of the candidates' samples"""
    counts: AnchorCounts
    """of every anchor, [N]; those of other processes include their memory"""
    memory: Memory | None = None
    """of the anchors of this process only"""
    batch_negatives: bool = True
    """False: no row of the batch is a negative"""
    positive_shift: Tensor | None = None
    """[N], added to the log weights of the positives of every anchor; None: 0"""

    @property
    def own_positive_shift(self) -> Tensor | None:
        """Shift of the anchors of this process."""
        return None if self.positive_shift is None else self.positive_shift[self.anchors.own_rows]

    @property
    def processes(self) -> int:
        """Number of processes."""
        return len(self.anchors.communicator.samples)

    @property
    def own_counts(self) -> AnchorCounts:
        """Counts of the anchors of this process."""
        return self.counts.of(self.anchors.own_rows)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors for ``save_for_backward``."""
        other, (positives, instances, available) = self.candidates, self.counts
        own, sides = self.anchors, self.anchors if other is None else other
        return (
            own.ids, own.instances, sides.ids, sides.instances, sides.log_weights, positives, instances,
            available if isinstance(available, Tensor) else None,
            *(self.memory or (None,) * len(Memory._fields)),
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Any]) -> GlobalBatch:
        """Returns the batch with other :attr:`tensors`, in the same order."""
        ids, instances, other_ids, other_instances, log_weights, positives, of_instances, *rest = tensors
        available, *memory = rest
        if isinstance(self.counts.candidates, int):
            available = self.counts.candidates
        anchors = replace(self.anchors, ids=ids, instances=instances)
        other = self.candidates
        if other is None:
            anchors = replace(anchors, log_weights=log_weights)
        else:
            other = replace(other, ids=other_ids, instances=other_instances, log_weights=log_weights)
        return replace(
            self,
            anchors=anchors,
            candidates=other,
            counts=AnchorCounts(positives, of_instances, available),
            memory=None if self.memory is None else Memory(*memory),
        )


def gather_sides(
    communicator: Communicator, sides: Sequence[Side], labelled: bool, given: bool, need_instances: bool
) -> list[Side]:
    """Gathers the ids of all samples.

    Args:
        communicator: of this loss call.
        sides: of this process: anchors, and separate candidates if there are any.
        labelled: whether the ids are labels; otherwise they are instances.
        given: whether the caller gave instances, with the same ids on all processes. If not, each sample is
            its own instance, and candidate sample k of a process is the instance of its sample k.
        need_instances: whether instances are needed although there are labels.
    """
    gathered = []
    for side in sides:
        instances = None
        if need_instances or not labelled:
            if given and side.instances is not None:
                instances = communicator.ids(side.instances)
            else:
                instances = torch.arange(sum(communicator.samples), device=side.ids.device)
        ids = communicator.ids(side.ids) if labelled or instances is None else instances
        gathered.append(Side(ids, instances, side.views))
        if len(gathered) < len(sides):
            assert communicator.candidates is not None
            communicator = communicator.candidates
    return gathered


class Further(NamedTuple):
    """What the own anchors are contrasted with in addition to the candidates."""

    memory: Side | None
    """one row per sample; None: there is none"""
    memory_rows: Tensor | None
    """[Nm, D]"""
    candidate_count: int | Tensor
    """number of candidates of each own anchor in the memory and the hard negatives"""


def build_global_batch(
    communicator: Communicator,
    anchors: Side,
    candidates: Side | None,
    further: Further | None,
    *,
    separate: bool,
    labelled: bool,
    need_instances: bool,
    ignored: Tensor | None,
    excluded: Tensor | None,
    batch_negatives: bool,
) -> GlobalBatch:
    """Counts positives, and exchanges those in the memory.

    Args:
        communicator: of this loss call.
        anchors: of all processes.
        candidates: of all processes, with log weights; None: the anchors.
        further: of this process; None: there are neither memory nor hard negatives.
        separate: whether the candidates are given; otherwise the anchors are their first views
            (``contrast_mode="one"``).
        labelled: whether ids are labels.
        need_instances: whether the loss needs |A_i|.
        ignored: bool [N], anchors whose label is ignored; None: there are none.
        excluded: bool of each candidate row, those of an ignored label; None: there are none.
        batch_negatives: whether rows of the batch are negatives.
    """
    first_views = candidates is not None and not separate
    memory = None if further is None else further.memory
    numbered = need_instances and labelled
    if numbered:  # ascending with the ids
        sides = [side for side in (anchors, candidates, memory) if side is not None]
        instances = [side.instances for side in sides if side.instances is not None]
        numbers = iter(number_pairs([side.ids for side in sides], instances))
        anchors = anchors._replace(instances=next(numbers))
        candidates = None if candidates is None else candidates._replace(instances=next(numbers))
        memory = None if memory is None else memory._replace(instances=next(numbers))

    def count(ids: Tensor, other_ids: Tensor | None) -> Tensor:
        if candidates is None or other_ids is None:
            return pair_by_id(ids, anchors.views, None, 1, None)[1]
        found = count_matches(torch.sort(other_ids)[0], ids, candidates.views)
        return repeat_per_view(found - int(first_views), anchors.views)

    def samples(side: Side, of: Communicator) -> Samples:
        return Samples(of, side.views, side.ids, side.instances if numbered else None, side.log_weights)

    positives = count(anchors.ids, None if candidates is None else candidates.ids)
    of_instances = positives if need_instances else None
    if numbered:
        assert anchors.instances is not None
        of_instances = count(anchors.instances, None if candidates is None else candidates.instances)
    counted = anchors if candidates is None else candidates
    available: int | Tensor = counted.ids.shape[0] * counted.views - int(not separate)
    if excluded is not None:
        available = (available - excluded.sum()).expand(positives.shape)
    if not batch_negatives:
        available = positives
    side = communicator
    if separate:
        assert communicator.candidates is not None
        side = communicator.candidates
    communicator = communicator.with_views(anchors.views)  # the anchors may be the first views only
    own = samples(anchors, communicator)
    others = None if candidates is None else samples(candidates, side)

    rows = None
    if further is not None:
        first, last = own.own
        columns = [torch.zeros_like(positives[own.own_rows]) + further.candidate_count]
        if memory is not None and further.memory_rows is not None:
            ascending, order = sort_rows(memory.ids, 1)
            matches = [count_matches(ascending, anchors.ids[first:last])]
            if numbered:
                assert anchors.instances is not None
                assert memory.instances is not None
                ascending, order = sort_rows(memory.instances, 1)
                matches.append(count_matches(ascending, anchors.instances[first:last]))
            columns += [repeat_per_view(found, own.views) for found in matches]
            of_memory = memory.instances if numbered else None
            rows = Memory(further.memory_rows, memory.ids, order, of_memory, memory.log_weights)
        found, *of_rows = communicator.exchange(torch.stack(columns))
        available = available + found
        if of_rows:
            positives = positives + of_rows[0]
            of_instances = None if of_instances is None else of_instances + of_rows[-1]
    if ignored is not None:
        positives = positives.masked_fill(ignored, 0)
        of_instances = None if of_instances is None else of_instances.masked_fill(ignored, 0)
    counts = AnchorCounts(positives, of_instances, available)
    return GlobalBatch(own, others, first_views, counts, rows, batch_negatives)
