"""The data of a run: splits, class names and loaders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pysupcon.data.augment import Augmentation, Normalize, OwnAugmentation, ResizeCenterCrop
from pysupcon.data.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_TEST_FRACTION,
    IMAGE_AUGMENTATIONS,
    DataConfig,
)
from pysupcon.data.group_files import ANNOTATED, Groups, index_groups, read_groups, true_groups
from pysupcon.data.identity import identify
from pysupcon.data.philox import philox_uniforms
from pysupcon.data.samplers import (
    BalancedBatchSampler,
    Draw,
    PerClassBatchSampler,
    ShuffledBatchSampler,
)
from pysupcon.data.sources import Samples, read_source
from pysupcon.data.splits import cap_per_class, rare_counts, stratified_split, stratified_subset
from pysupcon.data.unlabelled import concatenate, take_out
from pysupcon.data.unreadable import leave_out_unreadable
from pysupcon.data.vectors import Standardize, Unchanged, VectorAugmentation
from pysupcon.data.view_partners import ViewPartners
from pysupcon.data.workers import choose_workers, prepare_worker, threads_for
from pysupcon.errors import ConfigError
from pysupcon.user_code import is_reference


class EvaluationDataset(Dataset[tuple[Tensor, int, int]]):
    """A split without augmentation, for the evaluators.

    An item is (image float32 [C, S, S], normalised as in training; coarse label; fine label).

    Attributes:
        coarse, fine: labels of all samples, int64 [N].
        coarse_names, fine_names: names of the classes.

    Raises:
        ConfigError: the samples have several labels each.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        normalize: Normalize | Standardize,
        coarse_names: list[str],
        fine_names: list[str],
    ) -> None:
        if samples.fine.dim() > 1:
            raise ConfigError(
                "the evaluators need one label per sample, but data.dataset=image_table has several"
            )
        self.samples, self.normalize, self.size = samples, normalize, size
        self.resize = ResizeCenterCrop(size) if size else Unchanged()
        self.coarse, self.fine = samples.coarse, samples.fine
        self.coarse_names, self.fine_names = coarse_names, fine_names

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        """Items of a batch, as DataLoader requests them."""
        with threads_for(self.samples.images):
            images = self.normalize(
                torch.cat([self.resize(part) for part in _image_batches(self.samples, indices, self.size)])
            )
        rows = torch.tensor(indices)
        labels = (self.coarse[rows].tolist(), self.fine[rows].tolist())
        return list(zip(images, *labels, strict=True))


class MultiViewDataset(Dataset[tuple[Tensor, int]]):
    """Independently augmented views of the training samples.

    The item ``dataset[sample, draw]`` is (views uint8 [V, C, S, S]; label). The views depend only on seed,
    draw and sample, not on the process or on the rest of the batch. No global random state is used.
    ``partners`` gives the views other images of the class; None: all views show the sample.
    """

    def __init__(
        self,
        samples: Samples,
        labels: Tensor,
        augmentation: Augmentation | OwnAugmentation | VectorAugmentation,
        views: int,
        seed: int,
        partners: ViewPartners | None = None,
    ) -> None:
        self.samples, self.labels, self.augmentation = samples, labels, augmentation
        self.views, self.seed, self.partners = views, seed, partners

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Draw) -> tuple[Tensor, int]:
        views, labels = self.__getitems__([key])
        return views[0], int(labels[0])

    def __getitems__(self, keys: list[Draw]) -> tuple[Tensor, Tensor]:
        """A batch, as DataLoader requests it: views uint8 [b, V, C, S, S] and labels int64 [b]."""
        samples, draws = [sample for sample, _ in keys], [draw for _, draw in keys]
        uniforms = philox_uniforms(self.seed, draws, self.views * self.augmentation.num_uniforms)
        uniforms = uniforms.view(len(keys), self.views, self.augmentation.num_uniforms)
        labels = self.labels[torch.tensor(samples)]
        if self.partners is None:
            return self._views(samples, uniforms), labels
        views = [
            self._views(self.partners.images(samples, draws, view), uniforms[:, view : view + 1])
            for view in range(self.views)
        ]
        return torch.cat(views, dim=1), labels

    def _views(self, samples: list[int], uniforms: Tensor) -> Tensor:
        """Views of the images of ``samples``, one for each row of ``uniforms`` [b, views, numbers]."""
        batches = _image_batches(self.samples, samples, self.augmentation.size)
        views: list[Tensor] = []
        done = 0
        with threads_for(self.samples.images):
            if isinstance(self.augmentation, Augmentation) and not isinstance(self.samples.images, Tensor):
                return self.augmentation.of_batches(batches, uniforms)
            for images in batches:
                views.append(self.augmentation(images, uniforms[done : done + len(images)]))
                done += len(images)
        return views[0] if len(views) == 1 else torch.cat(views)


class GroupedMultiViewDataset(Dataset[tuple[Tensor, int, int]]):
    """A :class:`MultiViewDataset` whose items and batches also have the group: (views, label, group)."""

    def __init__(self, dataset: MultiViewDataset, groups: Tensor) -> None:
        self.dataset, self.groups = dataset, groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Draw) -> tuple[Tensor, int, int]:
        return (*self.dataset[key], int(self.groups[key[0]]))

    def __getitems__(self, keys: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        samples = torch.tensor([sample for sample, _ in keys])
        return (*self.dataset.__getitems__(keys), self.groups[samples])


def _image_batches(samples: Samples, indices: list[int], size: int) -> Iterator[Tensor]:
    """The images of ``indices`` in order, as batches uint8 [n, C, H, W] of equal image size.

    Tensors are one batch. Consecutive files of one size form a batch if no side is longer than ``size``.
    Larger ones come one at a time: they are resized one at a time, and a batch of them could fill the memory.
    """
    if isinstance(samples.images, Tensor):
        yield samples.images[torch.tensor(indices)]
        return
    files = samples.images

    def kind(image: Tensor) -> object:
        return image.shape if max(image.shape[-2:]) <= size else object()

    for _, same in groupby((files[index] for index in indices), key=kind):
        images = list(same)
        # A copy of a decoded file would have another memory order, which is slower to resize.
        yield images[0].unsqueeze(0) if len(images) == 1 else torch.stack(images)


class DataModule:
    """Splits of one data set and their loaders.

    Attributes:
        splits: samples of "train", "val" and "test", determined by files and ``data.split_seed``; disjoint,
            except that "train" holds "val" with ``data.train_on_val``. All classes are known.
        unlabelled: samples whose class is not known, labels :data:`pysupcon.data.unlabelled.UNKNOWN`; None
            without ``data.ignore_index``.
        skipped: with ``data.on_error`` skip, the names of the image files that were left out, with the
            reasons; else None.
        identity: what the samples are, before they are split.
        training: the samples of the batches: "train" and, with ``data.sampler`` shuffled, ``unlabelled``.
        coarse_names, fine_names: names of the classes.
        channels, image_size: shape of the model's input; D and 0 for vectors [D].
        normalize: converts uint8 images, or vectors, to the model's input.
        notes, feature_names, label_columns: see :class:`pysupcon.data.samples.Source`.

    Args:
        config: data section of the config, checked.
        dataset: the data set, if ``config.dataset`` records a passed object.
        skipped: names of the image files that ``data.on_error`` skip leaves out; None: those that cannot be
            read.
    """

    def __init__(
        self, config: DataConfig, dataset: object = None, skipped: Mapping[str, str] | None = None
    ) -> None:
        source = read_source(config, dataset)
        self.notes, self.feature_names = list(source.notes), source.feature_names
        self.label_columns = source.label_columns
        self.skipped: dict[str, str] | None = None
        if config.on_error == "skip":
            assert config.root is not None
            root = str(Path(config.root).expanduser())
            source, self.skipped = leave_out_unreadable(source, root, skipped)
        self.identity = identify(source, config.root and os.path.expanduser(config.root), own=config.is_own)
        self.unlabelled: Samples | None = None
        if config.ignore_index is not None:
            source, self.unlabelled = take_out(source, config.labels, config.ignore_index)
        train, test = source.train, source.test
        if test is None:
            fraction = config.test_fraction or DEFAULT_TEST_FRACTION
            rest, held_out = stratified_split(train.strata, fraction, config.split_seed)
            test, train = train.select(held_out), train.select(rest)
        val = source.val
        if val is None:
            rest, held_out = stratified_split(train.strata, config.val_fraction, config.split_seed + 1)
            val, train = train.select(held_out), train.select(rest)
        if source.max_per_class is not None:  # after the validation split, which stays balanced
            counts = dict(enumerate(source.max_per_class))
            train = train.select(cap_per_class(train.fine, counts, config.split_seed + 2))
        if config.train_fractions:
            counts = rare_counts(train.fine, source.fine_names, config.train_fractions)
            train = train.select(cap_per_class(train.fine, counts, config.split_seed + 4))
        if config.train_size is not None:
            train = train.select(_train_subset(train.strata, config.train_size, config.split_seed + 3))
        if config.train_on_val:
            train = concatenate(train, val)
        self.config = config
        self.splits = {"train": train, "val": val, "test": test}
        self.training = train
        if self.unlabelled is not None and config.sampler == "shuffled":
            self.training = concatenate(train, self.unlabelled)
        self.coarse_names, self.fine_names = source.coarse_names, source.fine_names
        self.channels = source.channels
        self.image_size = config.image_size or source.image_size
        self._family = source.family
        self.normalize: Normalize | Standardize
        if source.family == "vectors":
            assert isinstance(train.images, Tensor)
            if config.image_size is not None:
                raise ConfigError(
                    f"data.image_size has no effect with data.dataset={config.dataset}, vectors"
                )
            self.normalize = Standardize(train.images)
        else:
            self.normalize = Normalize(source.mean, source.std)
        self.augmentation = self._build_augmentation()

    def _build_augmentation(self) -> Augmentation | OwnAugmentation | VectorAugmentation:
        config = self.config
        if is_reference(config.augmentation):
            return OwnAugmentation(config.augmentation, config.augmentation_args, self.image_size)
        if isinstance(self.normalize, Standardize):
            return VectorAugmentation(config.augmentation, self.normalize, config.augmentation_args)  # type: ignore[arg-type]
        if config.augmentation not in IMAGE_AUGMENTATIONS or config.augmentation_args:
            raise ConfigError(
                "data.augmentation=noise or dropout, and data.augmentation_args, have no effect with images, "
                f"got {config.augmentation}, {config.augmentation_args}"
            )
        return Augmentation(config.augmentation, self._family, self.image_size)  # type: ignore[arg-type]

    @property
    def class_names(self) -> list[str]:
        """Names of the training classes."""
        return self.coarse_names if self.config.labels == "coarse" else self.fine_names

    @cached_property
    def true_groups(self) -> dict[str, Tensor]:
        """The true group of every sample, int64 [N] by split.

        Groups are pairs of a class and a fine label, numbered in ascending order over all splits.
        """
        labels = {name: self._labels(name) for name in self.splits}
        return index_groups(labels, {name: samples.fine for name, samples in self.splits.items()})

    @cached_property
    def groups(self) -> Groups | None:
        """The groups of ``data.groups``, read on first use because only training needs them.

        Raises:
            ConfigError: the file is missing or damaged, or was made for other samples.
        """
        if self.config.groups is None:
            return None
        labels = {name: self._labels(name) for name in self.splits}
        if self.config.groups == ANNOTATED:
            return true_groups(labels, self.true_groups)
        return read_groups(Path(self.config.groups).expanduser(), self.splits, labels)

    def workers(self, split: str, images: int, *, bytes_per_value: int = 1) -> int:
        """The number of processes that load batches of ``images`` images of a split, of ``data.workers``."""
        samples = self.training if split == "train" else self.splits[split]
        values = images * self.channels * max(self.image_size, 1) ** 2
        return choose_workers(self.config.workers, samples.images, values * bytes_per_value)

    def evaluation_dataset(self, split: str) -> EvaluationDataset:
        """A split without augmentation."""
        return EvaluationDataset(
            self.splits[split], self.image_size, self.normalize, self.coarse_names, self.fine_names
        )

    def batch_sampler(
        self, *, seed: int, steps: int, start: int = 0, rank: int = 0, world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> ShuffledBatchSampler:  # fmt: skip
        """The batch sampler of ``data.sampler`` over the training split."""
        config, labels = self.config, _one_each(self._labels_of(self.training))
        options: dict[str, Any] = {
            "seed": seed, "steps": steps, "start": start, "rank": rank, "world_size": world_size,
            "accumulation_steps": accumulation_steps,
        }  # fmt: skip
        if config.sampler == "per_class":
            assert config.samples_per_class is not None, "call DataConfig.check() first"
            return PerClassBatchSampler(
                labels, config.global_batch_size, samples_per_class=config.samples_per_class, **options
            )
        if config.sampler == "groups":
            assert self.groups is not None, "call DataConfig.check() first"
            labels = self.groups.train
        sampler_class = ShuffledBatchSampler if config.sampler == "shuffled" else BalancedBatchSampler
        return sampler_class(labels, config.global_batch_size, **options)

    def validation_batch_sampler(
        self, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> ShuffledBatchSampler:
        """The same pass over the validation split each time.

        The batches have equal size, at most ``data.batch_size``. A remainder is dropped.

        Raises:
            ConfigError: the split has fewer samples than processes.
        """
        labels = _one_each(self._labels("val"))
        size = len(labels) // math.ceil(len(labels) / self.config.global_batch_size) if len(labels) else 0
        size -= size % world_size
        if size < 1:
            raise ConfigError(
                f"trainer.best_by needs a validation sample for each of the {world_size} processes, but "
                f"data.val_fraction={self.config.val_fraction} gives {len(labels)}: pass "
                "--trainer.best_by null"
            )
        return ShuffledBatchSampler(
            labels, size, seed=seed, steps=len(labels) // size, rank=rank, world_size=world_size
        )

    def loader(
        self, batches: ShuffledBatchSampler, *, split: str = "train", pin_memory: bool = False
    ) -> DataLoader[Any]:
        """Loads batches of (views uint8 [b, V, C, S, S], labels int64 [b]), b samples per process. Labels are
        int64 [b, L], 0 or 1, if samples have several.

        Batches of the training split may have ``unlabelled`` samples, whose label is
        :data:`pysupcon.data.unlabelled.UNKNOWN`. With ``data.groups``, they also have groups int64 [b].
        """
        samples = self.training if split == "train" else self.splits[split]
        labels = self._labels_of(samples)
        partners: ViewPartners | None = None
        if self.config.view_partners == "class":
            partners = ViewPartners(labels, batches.seed, batches.steps_per_epoch * batches.batch_size)
        dataset = MultiViewDataset(
            samples, labels, self.augmentation, self.config.views, batches.seed, partners
        )
        per_process = self.config.global_batch_size // batches.world_size
        workers = self.workers(split, per_process * self.config.views)
        groups = self.groups if split == "train" else None
        return DataLoader(
            dataset if groups is None else GroupedMultiViewDataset(dataset, groups.train),
            batch_sampler=batches,
            collate_fn=_identity_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=prepare_worker if workers else None,
            # Without a generator, DataLoader would draw worker seeds from the global random state.
            generator=torch.Generator(),
        )

    def _labels(self, split: str) -> Tensor:
        return self._labels_of(self.splits[split])

    def _labels_of(self, samples: Samples) -> Tensor:
        return samples.coarse if self.config.labels == "coarse" else samples.fine


def _one_each(labels: Tensor) -> Tensor:
    """One label per sample; of samples with several, which are only shuffled, the first."""
    return labels if labels.dim() == 1 else labels[:, 0]


def _train_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    try:
        return stratified_subset(labels, count, seed)
    except ValueError as error:
        raise ConfigError(
            f"data.train_size must lie between the {len(labels.unique())} fine classes and the "
            f"{len(labels)} training samples, got {count}"
        ) from error


def _identity_collate(batch: Any) -> Any:
    return batch


def load_data(
    config: DataConfig, dataset: object = None, skipped: Mapping[str, str] | None = None
) -> DataModule:
    """Read and split the data set of ``config``.

    Args:
        config: data section of the config, checked. A ``batch_size`` of None is replaced by a number that
            fits the data.
        dataset, skipped: see :class:`DataModule`.

    Raises:
        ConfigError: files are missing or damaged, or there are fewer training samples than a batch needs.
    """
    data = DataModule(config, dataset, skipped)
    count = len(data.training)
    if config.batch_size is None:
        config.batch_size = config.global_batch_size
        if count < config.batch_size and config.sampler != "per_class":
            config.batch_size = _fitting_batch_size(count)
            data.notes.append(
                f"data.batch_size is {config.batch_size}, because there are only {count} training samples; "
                f"the default is {DEFAULT_BATCH_SIZE}"
            )
    if config.batch_size > count:
        example = f", e.g. --data.batch_size {_fitting_batch_size(count)}"
        raise ConfigError(
            f"data.batch_size must be at most the {count} training samples, got {config.batch_size}"
            + (example if config.sampler != "per_class" else "")
        )
    return data


def _fitting_batch_size(count: int) -> int:
    """The largest power of two that is at most a third of ``count``, and at least 2."""
    return int(max(2 ** (max(count // 3, 1).bit_length() - 1), 2))
