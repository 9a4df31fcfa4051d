"""Hidden subgroups of classes, inferred from features (Sohoni et al. 2020, arXiv 2011.12945).

Within each class, the features are reduced and clustered; the silhouette selects the number of clusters.
Robust training uses the clusters in place of the unknown true groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.evaluators.base import LinearHead
from pysupcon.evaluators.clustering import ClassClusters, SubgroupConfig


class Subgroups:
    """Inferred groups, numbered class by class in ascending order of the labels; see :func:`infer_groups`.

    Attributes:
        classes: [C] int64, the labels of the fitted samples.
        groups: [N] int64, the groups of the fitted samples.
        parent: [G] int64, the class label of each group.
        silhouettes: silhouette of each class, in [-1, 1]; 0 for a class of one group.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        config: SubgroupConfig,
        losses: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        _check_labels(labels, features)
        if losses is not None and (losses.shape != labels.shape or not losses.isfinite().all()):
            raise ValueError(
                f"losses must be finite, of shape [N]=[{len(features)}] (one per feature row), got shape "
                f"{list(losses.shape)}"
            )
        self._config = config
        self.classes = labels.cpu().unique()
        unknown = sorted(set(config.whole_classes) - set(self.classes.tolist()))
        if unknown:
            raise ValueError(
                f"subgroups.whole_classes must hold labels of the training samples, {self.classes.tolist()}, "
                f"got {unknown}"
            )
        rows, labels = self._prepare(features), labels.cpu()
        val_rows, val_labels = None, None
        if validation is not None:
            _check_labels(validation[1], validation[0])
            val_rows, val_labels = self._prepare(validation[0]), validation[1].cpu()
        self._fits: list[ClassClusters] = []
        self._first: list[int] = []
        self.groups = torch.empty(len(rows), dtype=torch.int64)
        parents: list[int] = []
        for label in self.classes.tolist():
            members = labels == label
            whole = label in config.whole_classes
            fit = ClassClusters(
                rows[members][:1] if whole else rows[members],
                config,
                None if losses is None or whole else losses.detach().to("cpu", torch.float64)[members],
                None if val_rows is None else val_rows[val_labels == label],
            )
            self._fits.append(fit)
            self._first.append(len(parents))
            self.groups[members] = len(parents) + fit.groups
            parents += [label] * fit.size
        self.parent = torch.tensor(parents)
        self.silhouettes = [fit.silhouette for fit in self._fits]

    def __len__(self) -> int:
        """The number of groups G."""
        return len(self.parent)

    def _prepare(self, features: Tensor) -> Tensor:
        rows = features.detach().to("cpu", torch.float64)
        return F.normalize(rows, dim=1) if self._config.normalize else rows

    def predict(self, features: Tensor, labels: Tensor) -> Tensor:
        """Groups [M] int64 of other samples [M, D] with class ``labels`` [M].

        -1 for unknown classes, and for clusters that hold no fitted sample.
        """
        rows, labels = self._prepare(features), labels.cpu()
        groups = torch.full((len(rows),), -1, dtype=torch.int64)
        for label, fit, first in zip(self.classes.tolist(), self._fits, self._first, strict=True):
            members = labels == label
            if members.any():
                found = fit.predict(rows[members])
                groups[members] = torch.where(found < 0, found, first + found)
        return groups


def infer_groups(
    features: Tensor,
    labels: Tensor,
    config: SubgroupConfig | None = None,
    *,
    losses: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Subgroups:
    """Infer groups within classes.

    Args:
        features: [N, D] of a floating-point dtype.
        labels: [N] int64, the classes.
        config: None means the defaults.
        losses: [N], classification losses of the samples. ``config.overcluster`` splits off parts of high
            loss; None: parts of any loss.
        validation: features [M, D] and classes [M] of the validation samples, for ``config.min_val_part``.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
        ImportError: reduce="umap" without umap-learn.
    """
    return Subgroups(features, labels, config or SubgroupConfig(), losses, validation)


def head_losses(head: LinearHead, features: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a classification head for every row, [N] fp64 on the CPU."""
    return F.cross_entropy(head.logits(features), labels.cpu(), reduction="none")


def _check_labels(labels: Tensor, features: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape [N]=[{len(features)}] (one class per feature row), "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )


class Recovery(NamedTuple):
    """How well clusters match the true groups, in [0, 1]."""

    f1: float
    """Mean F1 score of the true groups under the best one-to-one matching with clusters; 0 for unmatched
    groups"""
    purity: float
    """Fraction of the samples that belong to the most frequent true group of their cluster"""


def recovery(groups: Tensor, truth: Tensor) -> Recovery:
    """Compare clusters ``groups`` [N] with true groups ``truth`` [N], both int64 with any labels."""
    from scipy.optimize import linear_sum_assignment

    _, cluster = groups.unique(return_inverse=True)
    _, true_group = truth.unique(return_inverse=True)
    table = torch.zeros(int(true_group.max()) + 1, int(cluster.max()) + 1, dtype=torch.int64)
    table.index_put_((true_group, cluster), torch.ones_like(true_group), accumulate=True)
    f1 = 2 * table / (table.sum(dim=1, keepdim=True) + table.sum(dim=0, keepdim=True))
    rows, columns = linear_sum_assignment(f1.numpy(), maximize=True)
    matched = f1[torch.as_tensor(rows), torch.as_tensor(columns)].sum().item() / len(table)
    return Recovery(matched, table.amax(dim=0).sum().item() / len(groups))
