"""Batch samplers. A batch is a function of (seed, step) alone: resuming, or another number of loader
processes, changes nothing, and the ranks of several processes divide one global batch without talking to one
another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pysupcon.errors import ConfigError

Draw = tuple[int, int]
"""(sample, number of this draw since the start of the training); the second seeds the draw's augmentation."""


class ShuffledBatchSampler(Sampler[list[Draw]]):
    """Every sample once an epoch, in an order that depends on the epoch; an incomplete last batch is left
    out.

    Args:
        labels: int64 [N] of the training split.
        batch_size: samples in a global batch; a multiple of ``world_size``.
        seed: of the order.
        steps: global batches of the whole training.
        start: first step to draw: of a resumed training, the number of steps already done.
        rank, world_size: this process draws entries rank, rank + world_size, ... of each global batch.
        multiple: the batches of an epoch are a multiple of it; those left over are left out.

    Raises:
        ConfigError: ``data.batch_size`` exceeds N or is no multiple of ``world_size``, or an epoch has fewer
            batches than ``multiple``.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        if batch_size > len(labels):
            raise ConfigError(
                f"data.batch_size must be at most the {len(labels)} training samples, got {batch_size}"
            )
        if batch_size % world_size:
            raise ConfigError(
                f"data.batch_size must be a multiple of the {world_size} processes, got {batch_size}"
            )
        self.labels, self.batch_size, self.seed, self.steps, self.start = (
            labels,
            batch_size,
            seed,
            steps,
            start,
        )
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
            epoch, done = divmod(step, self.steps_per_epoch)
            for within, batch in enumerate(self._epoch(epoch)):
                if within < done or step >= self.steps:
                    continue
                first = step * self.batch_size
                mine = range(self.rank, self.batch_size, self.world_size)
                yield [(int(batch[slot]), first + slot) for slot in mine]
                step += 1

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.labels), generator=self._generator(epoch))
        yield from order[: self.steps_per_epoch * self.batch_size].view(-1, self.batch_size)


class BalancedBatchSampler(ShuffledBatchSampler):
    """Every class in equal numbers in every batch (numbers differ by one at most).

    With more classes than ``batch_size`` a batch holds as many classes as fit, one sample each, and the
    classes take turns: none waits longer than ceil(classes / batch_size) batches. Within a class its samples
    take turns too, in an order drawn anew each epoch; a sample repeats in a batch only if the class has fewer
    than the batch needs. An epoch has as many batches as without balancing. A global batch is grouped by
    class before the ranks divide it in turns, so every rank's share is balanced as well."""

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        generator = self._generator(epoch)
        classes = self.labels.unique(sorted=True)
        turn = torch.randperm(len(classes), generator=torch.Generator().manual_seed(self.seed)).tolist()
        members = [(self.labels == label).nonzero().flatten() for label in classes]
        pools: list[list[int]] = [[] for _ in members]
        quota, extra = divmod(self.batch_size, len(classes))

        def draw(index: int, count: int) -> list[int]:
            if (
                len(pools[index]) < count
            ):  # start the class anew: what is left may repeat within this batch otherwise
                order = torch.randperm(len(members[index]), generator=generator)
                pools[index] = members[index][order].tolist()
            drawn = pools[index][:count]
            del pools[index][:count]
            return drawn if len(drawn) == count else drawn + draw(index, count - len(drawn))

        for within in range(self.steps_per_epoch):
            offset = (epoch * self.steps_per_epoch + within) * extra
            lucky = {turn[(offset + k) % len(turn)] for k in range(extra)}
            batch: list[int] = []
            for index in range(len(members)):
                count = quota + (index in lucky)
                if count:
                    batch += draw(index, count)
            yield torch.tensor(batch)
