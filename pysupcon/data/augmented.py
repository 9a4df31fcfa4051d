"""Augmented images of the training split, for evaluators that fit classifiers to their features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pysupcon.data.datamodule import DataModule, MultiViewDataset

_STREAM = 2**62 - 57
"""Keeps the random numbers apart from those of the training, which has the same seed."""


class AugmentedDataset(Dataset[tuple[Tensor, int, int]]):
    """One pass over the training split, each sample augmented once, in the order of the split.

    An item is that of :class:`pysupcon.data.datamodule.EvaluationDataset`, but for the augmentation of the
    run, ``data.augmentation``. It depends only on the seed, the pass and the sample. Samples of unknown class
    are left out, and ``data.view_partners`` has no effect: an image keeps its own label.

    Args:
        data: the data of the run.
        seed: seed of the random numbers.
        number: number of the pass, from 0; every pass has random numbers of its own.
    """

    def __init__(self, data: DataModule, seed: int, number: int) -> None:
        samples = data.splits["train"]
        self.coarse, self.fine = samples.coarse, samples.fine
        self.first = number * len(samples)
        self.normalize = data.normalize
        self.views = MultiViewDataset(samples, samples.fine, data.augmentation, 1, seed + _STREAM)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        """Items of a batch, as DataLoader requests them."""
        views, _ = self.views.__getitems__([(index, self.first + index) for index in indices])
        rows = torch.tensor(indices)
        labels = (self.coarse[rows].tolist(), self.fine[rows].tolist())
        return list(zip(self.normalize(views[:, 0]), *labels, strict=True))
