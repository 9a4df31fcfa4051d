"""Views from different images of a class: a control whose "own view" is another image.

Class-conditional InfoNCE takes the own view of an image as its positive, which ties each image to itself.
With partners that change every epoch nothing does, and the loss is invariant to permutations within a class
(Chen et al. 2022, arXiv 2204.07596). Averaged over the pairings, the loss of anchor i is logsumexp_p s_ip -
mean_p s_ip over the other rows p of its class. Its minimum, the logarithm of their number, is reached if all
similarities are equal: with the tie, the reason to spread goes, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysupcon.data.unlabelled import UNKNOWN

_STREAM = 2**61 - 1
"""Keeps the random numbers apart from those of the samplers, which have the same seeds."""


class ViewPartners:
    """The images of the views of a sample, paired anew in each epoch.

    In each epoch the samples of every class lie on a random circle, determined by seed and epoch. View v of a
    sample shows the image v places further on: for every v, the images are a permutation within the classes,
    and no image is its own partner, except if its class has at most v images. Samples of unknown class keep
    their own image.

    Args:
        labels: classes, int64 [N].
        seed: seed of the run.
        draws_per_epoch: draws of an epoch, over all processes.
    """

    def __init__(self, labels: Tensor, seed: int, draws_per_epoch: int) -> None:
        self.labels, self.seed, self.draws_per_epoch = labels, seed, draws_per_epoch
        self._epoch: int | None = None  # the one that is kept; batches come in order
        self._order = self._rank = self._start = self._size = torch.empty(0, dtype=torch.int64)

    def images(self, samples: list[int], draws: list[int], view: int) -> list[int]:
        """The image of a view for each sample.

        Args:
            samples: samples of a batch.
            draws: index of each draw since the start of the training.
            view: number of the view; that of view 0 is the sample itself.
        """
        if view == 0:
            return samples
        chosen = torch.tensor(samples)
        found, epochs = chosen.clone(), torch.tensor(draws) // self.draws_per_epoch
        for epoch in epochs.unique().tolist():
            self._pair(epoch)
            rows = (epochs == epoch) & (self.labels[chosen] != UNKNOWN)
            of_epoch = chosen[rows]
            start, size = self._start[of_epoch], self._size[of_epoch]
            found[rows] = self._order[start + (self._rank[of_epoch] - start + view) % size]
        partners: list[int] = found.tolist()
        return partners

    def _pair(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        seed = (self.seed * 1_000_003 + epoch + _STREAM) % 2**63
        shuffled = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        self._order = shuffled[self.labels[shuffled].argsort(stable=True)]
        self._rank = torch.empty_like(self._order)
        self._rank[self._order] = torch.arange(len(self._order))
        _, classes, counts = self.labels.unique(return_inverse=True, return_counts=True)
        self._start, self._size = (counts.cumsum(0) - counts)[classes], counts[classes]
        self._epoch = epoch
