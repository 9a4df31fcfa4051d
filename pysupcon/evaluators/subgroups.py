"""Hidden subgroups of classes, inferred from features (Sohoni et al. 2020, arXiv 2011.12945).

Within each class, the features are reduced and clustered; the silhouette selects the number of clusters.
Robust training uses the clusters in place of the unknown true groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MULTITHREADING_SIZE = 1 << 24


@dataclass
class SubgroupConfig:
    """How the groups of a class are inferred from its features."""

    reduce: Literal["none", "pca", "umap"] = "pca"
    """none, pca or umap (requires the package umap-learn)."""

    dimensions: int = 16
    """Maximum dimensions of the reduced features; small classes have fewer. No effect with none."""

    cluster: Literal["kmeans", "gmm"] = "gmm"
    """k-means, or a Gaussian mixture (with full covariances, or diagonal ones if a cluster would have fewer
    than two samples per dimension)."""

    k_min: int = 2
    """Smallest number of clusters to try per class."""

    k_max: int = 10
    """Largest number of clusters to try per class. A tie goes to the smaller number."""

    overcluster: int = 1
    """Factor of the number of clusters selected by the silhouette, which separates small groups from large
    ones. 1 is off."""

    normalize: bool = True
    """Normalise the features to unit length first."""

    silhouette_samples: int = 2000
    """Number of samples of a class used for its silhouette, whose cost is quadratic in it."""

    seed: int = 0
    """Seed of the clustering, of umap and of the silhouette's samples."""

    def __post_init__(self) -> None:
        if self.reduce not in ("none", "pca", "umap"):
            raise ValueError(f'subgroups.reduce must be "none", "pca" or "umap", got {self.reduce!r}')
        if self.cluster not in ("kmeans", "gmm"):
            raise ValueError(f'subgroups.cluster must be "kmeans" or "gmm", got {self.cluster!r}')
        if not 2 <= self.k_min <= self.k_max:
            raise ValueError(
                f"subgroups.k_min and k_max must be 2 <= k_min <= k_max, got {self.k_min} and {self.k_max}"
            )
        for name in ("dimensions", "overcluster"):
            if getattr(self, name) < 1:
                raise ValueError(f"subgroups.{name} must be at least 1, got {getattr(self, name)}")
        if self.silhouette_samples <= self.k_max:
            raise ValueError(
                f"subgroups.silhouette_samples must be more than k_max={self.k_max}, "
                f"got {self.silhouette_samples}"
            )


class _ClassClusters(NamedTuple):
    """Fitted reducer and clusterer of a class (None for one group), its first group, size and silhouette."""

    reducer: Any
    clusterer: Any
    first: int
    size: int
    silhouette: float


class Subgroups:
    """Inferred groups, numbered class by class in ascending order of the labels.

    Attributes:
        classes: [C] int64, the labels of the fitted samples.
        groups: [N] int64, the groups of the fitted samples.
        parent: [G] int64, the class label of each group.
        silhouettes: silhouette of each class, in [-1, 1]; 0 for a class of one group.
    """

    def __init__(self, features: Tensor, labels: Tensor, config: SubgroupConfig) -> None:
        if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape [N]=[{len(features)}] (one class per feature row), "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        self._config = config
        self.classes = labels.cpu().unique()
        rows = self._prepare(features)
        self._fits: list[_ClassClusters] = []
        self.groups = torch.empty(len(rows), dtype=torch.int64)
        parents: list[int] = []
        for label in self.classes.tolist():
            members = (labels.cpu() == label).nonzero().flatten()
            fit, groups = _fit_class(rows[members], len(parents), config)
            self._fits.append(fit)
            self.groups[members] = groups
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
        """Groups [M] int64 of other samples [M, D] with class ``labels`` [M]; -1 for unknown classes."""
        rows, labels = self._prepare(features), labels.cpu()
        groups = torch.full((len(rows),), -1, dtype=torch.int64)
        for label, fit in zip(self.classes.tolist(), self._fits, strict=True):
            members = (labels == label).nonzero().flatten()
            if len(members) == 0:
                continue
            if fit.clusterer is None:
                groups[members] = fit.first
                continue
            with _threads(rows.numel()):
                points = rows[members].numpy()
                points = points if fit.reducer is None else fit.reducer.transform(points)
                groups[members] = fit.first + torch.as_tensor(fit.clusterer.predict(points)).long()
        return groups


def infer_groups(features: Tensor, labels: Tensor, config: SubgroupConfig | None = None) -> Subgroups:
    """Infer groups of ``features`` [N, D] within the classes ``labels`` [N] int64; see :class:`Subgroups`.

    Raises:
        ValueError: ``labels`` has a wrong shape or dtype.
        ImportError: reduce="umap" without umap-learn.
    """
    return Subgroups(features, labels, config or SubgroupConfig())


def _threads(size: int) -> Any:
    from threadpoolctl import threadpool_limits

    # Threads do not speed up small inputs and are slow on a busy machine.
    return threadpool_limits(1 if size < _MULTITHREADING_SIZE else None)


def _reducer(config: SubgroupConfig, samples: int, width: int) -> Any:
    dimensions = min(config.dimensions, samples - 1, width)
    if config.reduce == "none" or dimensions < 1:
        return None
    if config.reduce == "pca":
        from sklearn.decomposition import PCA

        return PCA(dimensions, random_state=config.seed)
    try:
        umap = import_module("umap")
    except ImportError as error:
        raise ImportError(
            "subgroups.reduce=umap needs the package umap-learn, which is not installed: "
            "pip install umap-learn, or choose pca or none"
        ) from error
    return umap.UMAP(
        n_components=dimensions, random_state=config.seed, min_dist=0.0, n_neighbors=min(15, samples - 1)
    )


def _clusterer(config: SubgroupConfig, k: int, points: Any) -> Any:
    if config.cluster == "kmeans":
        from sklearn.cluster import KMeans

        return KMeans(k, n_init=4, random_state=config.seed)
    from sklearn.mixture import GaussianMixture

    samples, width = points.shape
    # A full covariance overfits without clearly more samples than dimensions.
    covariance = "full" if samples >= 2 * k * width else "diag"
    return GaussianMixture(k, covariance_type=covariance, random_state=config.seed)


def _fit_class(rows: Tensor, first: int, config: SubgroupConfig) -> tuple[_ClassClusters, Tensor]:
    """Cluster the ``rows`` [n, D] of one class; returns the clusters and the group of each row."""
    distinct = len(rows.unique(dim=0))
    k_max = min(config.k_max, distinct - 1)  # a silhouette needs a cluster of at least two samples
    if k_max < config.k_min:
        return _ClassClusters(None, None, first, 1, 0.0), torch.full((len(rows),), first)
    from sklearn.metrics import silhouette_score

    with _threads(rows.numel()):
        reducer = _reducer(config, len(rows), rows.shape[1])
        points = rows.numpy() if reducer is None else reducer.fit_transform(rows.numpy())
        generator = torch.Generator().manual_seed(config.seed)
        sampled = torch.randperm(len(rows), generator=generator)[: config.silhouette_samples].numpy()
        best: tuple[float, int, Any] | None = None
        for k in range(config.k_min, k_max + 1):
            clusterer = _fit_quietly(_clusterer(config, k, points), points)
            found = clusterer.predict(points)[sampled]
            if len(set(found.tolist())) < 2:
                continue
            score = float(silhouette_score(points[sampled], found))
            if best is None or score > best[0]:
                best = (score, k, clusterer)
        if best is None:
            return _ClassClusters(None, None, first, 1, 0.0), torch.full((len(rows),), first)
        score, k, clusterer = best
        k_final = min(k * config.overcluster, distinct)
        if k_final > k:
            k, clusterer = k_final, _fit_quietly(_clusterer(config, k_final, points), points)
        groups = first + torch.as_tensor(clusterer.predict(points)).long()
    return _ClassClusters(reducer, clusterer, first, k, score), groups


def _fit_quietly(clusterer: Any, points: Any) -> Any:
    """Fit without convergence warnings; a fit that does not converge has a poor silhouette."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return clusterer.fit(points)


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
