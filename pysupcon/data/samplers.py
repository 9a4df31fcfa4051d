"""Batch samplers whose batches depend only on seed and step.

Resuming and the number of loader processes do not change the batches. Several ranks divide a global batch
without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from pysupcon.data.per_class import as_integers, deal_batches, group_by_label
from pysupcon.errors import ConfigError

Draw = tuple[int, int]
"""(sample, index of the draw since the start of training); the index seeds the augmentation."""


class ShuffledBatchSampler(Sampler[list[Draw]]):
    """Yields every sample once per epoch, shuffled anew each epoch; an incomplete last batch is dropped.

    Args:
        labels: integers or bools [N] of the training split: a tensor, an array or a list.
        batch_size: samples in a global batch; a multiple of ``world_size``.
        seed: seed of the order.
        steps: global batches of the whole training.
        start: first step to draw; in a resumed training, the number of completed steps.
        rank, world_size: this process gets entries rank, rank + world_size, ... of each global batch.
        accumulation_steps: the batches of an epoch are a multiple of it; surplus batches are dropped.

    Raises:
        TypeError: ``labels`` are no integers [N]; the message says what they are.
        ConfigError: ``data.batch_size`` exceeds N or is not a multiple of ``world_size``, or an epoch has
            fewer batches than ``accumulation_steps``.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray | Sequence[int],
        batch_size: int,
        *,
        seed: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        labels = as_integers(labels)
        if batch_size > len(labels):
            raise ConfigError(
                f"data.batch_size must be at most the {len(labels)} training samples, got {batch_size}"
            )
        if batch_size % world_size:
            raise ConfigError(
                f"data.batch_size must be a multiple of the {world_size} processes, got {batch_size}"
            )
        self.labels, self.batch_size = labels, batch_size
        self.seed, self.steps, self.start = seed, steps, start
        self.rank, self.world_size = rank, world_size
        batches = len(labels) // batch_size
        if batches < accumulation_steps:
            raise ConfigError(
                f"trainer.accumulation_steps must be at most the {batches} batches of an epoch, "
                f"got {accumulation_steps}"
            )
        self.steps_per_epoch = batches - batches % accumulation_steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while step < self.steps:
            epoch, offset = divmod(step, self.steps_per_epoch)
            for index, batch in enumerate(self._epoch(epoch)):
                if index < offset or step >= self.steps:
                    continue
                first = step * self.batch_size
                yield [(int(batch[slot]), first + slot) for slot in self._own_slots()]
                step += 1

    def _own_slots(self) -> range:
        """Entries of a global batch that this process gets."""
        return range(self.rank, self.batch_size, self.world_size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.labels), generator=self._generator(epoch))
        yield from order[: self.steps_per_epoch * self.batch_size].view(-1, self.batch_size)


class BalancedBatchSampler(ShuffledBatchSampler):
    """Yields batches with equally many samples of every class (counts differ by at most one).

    With more classes than ``batch_size``, a batch has one sample each of ``batch_size`` classes, and every
    class occurs at least once in ceil(classes / batch_size) batches. Samples of a class follow an order that
    is shuffled anew each epoch; a sample repeats in a batch only if its class is smaller than the batch
    needs. An epoch has as many batches as with :class:`ShuffledBatchSampler`. A global batch is sorted by
    class and divided with stride ``world_size``, so the part of every rank is balanced as well.
    """

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        generator = self._generator(epoch)
        classes = self.labels.unique(sorted=True)
        class_order = torch.randperm(
            len(classes), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        members = [(self.labels == label).nonzero().flatten() for label in classes]
        pools: list[list[int]] = [[] for _ in members]
        quota, extra = divmod(self.batch_size, len(classes))

        def draw(index: int, count: int) -> list[int]:
            if len(pools[index]) < count:  # reshuffle; leftover samples could repeat in this batch
                order = torch.randperm(len(members[index]), generator=generator)
                pools[index] = members[index][order].tolist()
            drawn = pools[index][:count]
            del pools[index][:count]
            return drawn if len(drawn) == count else drawn + draw(index, count - len(drawn))

        for step in range(self.steps_per_epoch):
            offset = (epoch * self.steps_per_epoch + step) * extra
            extra_classes = {class_order[(offset + k) % len(classes)] for k in range(extra)}
            batch: list[int] = []
            for index in range(len(members)):
                count = quota + (index in extra_classes)
                if count:
                    batch += draw(index, count)
            yield torch.tensor(batch)


class PerClassBatchSampler(ShuffledBatchSampler):
    """Yields batches of ``samples_per_class`` samples each of ``batch_size / samples_per_class`` classes.

    The batches are those of :class:`pysupcon.data.PerClassBatches`. Every rank gets whole classes. An epoch
    has as many batches as with :class:`ShuffledBatchSampler`.

    Args:
        samples_per_class: at least 2; divides ``batch_size``. The number of classes in a batch must be at
            most the number of classes and a multiple of ``world_size``.
        labels, batch_size, options: as for :class:`ShuffledBatchSampler`.

    Raises:
        TypeError: as for :class:`ShuffledBatchSampler`.
        ConfigError: ``data.batch_size`` and ``samples_per_class`` do not fit the labels or ``world_size``.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray | Sequence[int],
        batch_size: int,
        *,
        samples_per_class: int,
        **options: Any,
    ) -> None:
        super().__init__(labels, batch_size, **options)
        self.samples_per_class = samples_per_class
        self._members = group_by_label(self.labels)
        classes, available = batch_size // samples_per_class, len(self._members)
        batch = f"data.batch_size={batch_size} and data.samples_per_class={samples_per_class} give {classes}"
        if classes > available:
            raise ConfigError(f"{batch} classes per batch, more than the {available} of the training samples")
        if classes % self.world_size:
            raise ConfigError(f"{batch} classes per batch, not a multiple of the {self.world_size} processes")

    def _own_slots(self) -> range:
        size = self.batch_size // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        classes = self.batch_size // self.samples_per_class
        drawn = deal_batches(self._members, classes, self.samples_per_class, self._generator(epoch))
        for _ in range(self.steps_per_epoch):
            yield torch.tensor(next(drawn))
