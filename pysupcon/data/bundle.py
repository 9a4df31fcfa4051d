"""Everything a run needs of its data: splits, names, views in batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pysupcon.data.augment import Normalize, Transform, plain_transform, view_transform
from pysupcon.data.config import DEFAULT_TEST_FRACTION, DataConfig
from pysupcon.data.samplers import BalancedBatches, Draw, ShuffledBatches
from pysupcon.data.sources import Samples, read_source
from pysupcon.data.splits import stratified_split
from pysupcon.errors import ConfigError


class PlainDataset(Dataset[tuple[Tensor, int, int]]):
    """A split as the evaluators see it, without augmentation.

    Item: (image float32 [C, S, S], normalised as in training; coarse label; fine label).

    Attributes:
        coarse, fine: labels of all samples, int64 [N].
        coarse_names, fine_names: names of the classes.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        normalize: Normalize,
        coarse_names: list[str],
        fine_names: list[str],
    ) -> None:
        self.samples, self.transform, self.normalize = samples, plain_transform(size), normalize
        self.coarse, self.fine = samples.coarse, samples.fine
        self.coarse_names, self.fine_names = coarse_names, fine_names

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.normalize(self.transform(self.samples.images[index]))
        return image, int(self.coarse[index]), int(self.fine[index])


class ViewDataset(Dataset[tuple[Tensor, int]]):
    """Independently augmented views of the training samples.

    Item ``dataset[sample, draw]``: (views uint8 [V, C, S, S]; label). The views are a function of (seed,
    draw, sample) alone, whichever process makes them; the caller's random state is left as it was."""

    def __init__(self, samples: Samples, labels: Tensor, transform: Transform, views: int, seed: int) -> None:
        self.samples, self.labels, self.transform, self.views, self.seed = (
            samples,
            labels,
            transform,
            views,
            seed,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Draw) -> tuple[Tensor, int]:
        sample, draw = key
        generator = torch.default_generator
        state = generator.get_state()
        # the generator keeps 32 bits of a seed: odd factors spread neighbouring draws over all of them
        generator.manual_seed((self.seed * 0x85EBCA6B + draw * 0x9E3779B1) % 2**32)
        try:
            image = self.samples.images[sample]
            views = torch.stack([self.transform(image) for _ in range(self.views)])
        finally:
            generator.set_state(state)
        return views, int(self.labels[sample])


class Data:
    """Splits of one data set.

    Attributes:
        splits: "train", "val", "test" -> samples; disjoint, a function of the files and ``data.split_seed``.
        coarse_names, fine_names: names of the classes.
        channels, image_size: of what the model sees.
        normalize: from uint8 images to what the model sees.
    """

    def __init__(self, config: DataConfig) -> None:
        source = read_source(config)
        train, test = source.train, source.test
        if test is None:
            fraction = config.test_fraction or DEFAULT_TEST_FRACTION
            rest, held = stratified_split(train.fine, fraction, config.split_seed)
            test, train = train.select(held), train.select(rest)
        val = source.val
        if val is None:
            rest, held = stratified_split(train.fine, config.val_fraction, config.split_seed + 1)
            val, train = train.select(held), train.select(rest)
        self.config = config
        self.splits = {"train": train, "val": val, "test": test}
        self.coarse_names, self.fine_names = source.coarse_names, source.fine_names
        self.channels = source.channels
        self.image_size = config.image_size or source.image_size
        self.normalize = Normalize(source.mean, source.std)
        self._family = source.family

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that are trained on."""
        return self.coarse_names if self.config.labels == "coarse" else self.fine_names

    def plain(self, split: str) -> PlainDataset:
        """A split without augmentation."""
        return PlainDataset(
            self.splits[split], self.image_size, self.normalize, self.coarse_names, self.fine_names
        )

    def batches(
        self, *, seed: int, steps: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> ShuffledBatches:
        """The batch sampler of ``data.sampler`` over the training split."""
        kind = BalancedBatches if self.config.sampler == "balanced" else ShuffledBatches
        return kind(
            self._labels("train"), self.config.batch_size,
            seed=seed, steps=steps, start=start, rank=rank, world_size=world_size,
        )  # fmt: skip

    def validation_batches(self, *, seed: int, rank: int = 0, world_size: int = 1) -> ShuffledBatches:
        """One pass over the validation split, the same each time: as few batches of at most
        ``data.batch_size`` as hold all samples, of equal size (a remainder is left out).

        Raises:
            ConfigError: the split has fewer samples than there are processes.
        """
        labels = self._labels("val")
        size = len(labels) // math.ceil(len(labels) / self.config.batch_size) if len(labels) else 0
        size -= size % world_size
        if size < 1:
            raise ConfigError(
                f"trainer.best_by needs a validation sample for each of the {world_size} processes, but "
                f"data.val_fraction={self.config.val_fraction} gives {len(labels)}: pass "
                "--trainer.best_by null"
            )
        return ShuffledBatches(
            labels, size, seed=seed, steps=len(labels) // size, rank=rank, world_size=world_size
        )

    def loader(
        self, batches: ShuffledBatches, *, split: str = "train", pin_memory: bool = False
    ) -> DataLoader[Any]:
        """Batches of (views uint8 [b, V, C, S, S], labels int64 [b]), b this process's share of a global
        batch."""
        transform = view_transform(self.config.augmentation, self._family, self.image_size)
        dataset = ViewDataset(
            self.splits[split], self._labels(split), transform, self.config.views, batches.seed
        )
        workers = self.config.workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_one_thread if workers else None,
            # seeds the processes; drawn from the global generator, a resumed run would draw it too late
            generator=torch.Generator(),
        )

    def _labels(self, split: str) -> Tensor:
        samples = self.splits[split]
        return samples.coarse if self.config.labels == "coarse" else samples.fine


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def load_data(config: DataConfig) -> Data:
    """Read and split the data set of ``config``.

    Raises:
        ConfigError: the files are not there or damaged, or there are fewer training samples than a batch
            needs.
    """
    data = Data(config)
    count, size = len(data.splits["train"]), config.batch_size
    if size > count:
        raise ConfigError(f"data.batch_size must be at most the {count} training samples, got {size}")
    return data
