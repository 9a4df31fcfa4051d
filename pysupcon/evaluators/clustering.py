"""Clusters of the samples of one class (Sohoni et al. 2020, arXiv 2011.12945)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

_MULTITHREADING_SIZE = 1 << 24
_DIMENSIONS = {"pca": 16, "umap": 2}
_NEIGHBOURS = 10  # of umap, in Sohoni et al.'s public code


@dataclass
class SubgroupConfig:
    """How the groups of a class are inferred from its features."""

    reduce: Literal["none", "pca", "umap"] = "pca"
    """none, pca or umap (requires the package umap-learn). Sohoni et al. reduce to two dimensions of umap;
    the default needs no further package."""

    dimensions: int | None = None
    """Maximum dimensions of the reduced features; small classes have fewer. None: 2 with umap, 16 with pca.
    No effect with none."""

    cluster: Literal["kmeans", "gmm"] = "gmm"
    """k-means, or a Gaussian mixture (with full covariances, or diagonal ones if a cluster would have fewer
    than two samples per dimension)."""

    k_min: int = 2
    """Smallest number of clusters to try per class."""

    k_max: int = 10
    """Largest number of clusters to try per class. A tie goes to the smaller number."""

    overcluster: int = 1
    """Number of parts that each cluster of a class is then split into, to find small groups inside large
    ones; Sohoni et al. use 5. A part becomes a group of its own only if the silhouette of its samples rises,
    and is above 0; if their mean loss is not below that of the cluster; and if it is large enough (min_part,
    min_part_share, min_val_part). The other parts stay one group. The losses are those of the trained
    classification head; without one, the condition on the loss does not apply. 1 is off."""

    normalize: bool = True
    """Normalise the features to unit length first."""

    silhouette_samples: int = 2000
    """Number of samples of a class used for its silhouettes, whose cost is quadratic in it."""

    seed: int = 0
    """Seed of the clustering, of umap and of the silhouette's samples."""

    score: Literal["clusters", "samples"] = "clusters"
    """What chooses the number of clusters. clusters: the mean of the silhouettes of the clusters, in which a
    small cluster counts as much as a large one (Sohoni et al.); samples: the mean over the samples."""

    n_init: int = 3
    """Initialisations of a clustering; the best fit is kept."""

    min_part: int = 25
    """overcluster only: smallest number of training samples of a part that is kept."""

    min_part_share: float = 0.005
    """overcluster only: smallest fraction of its class's training samples."""

    min_val_part: int = 25
    """overcluster only: smallest number of validation samples that fall into the part, without which its
    validation accuracy would say little. 0: the validation samples have no influence."""

    whole_classes: list[int] = field(default_factory=list)
    """Labels of classes that are not clustered: each of them is one group."""

    def __post_init__(self) -> None:
        if self.reduce not in ("none", "pca", "umap"):
            raise ValueError(f'subgroups.reduce must be "none", "pca" or "umap", got {self.reduce!r}')
        if self.cluster not in ("kmeans", "gmm"):
            raise ValueError(f'subgroups.cluster must be "kmeans" or "gmm", got {self.cluster!r}')
        if self.score not in ("clusters", "samples"):
            raise ValueError(f'subgroups.score must be "clusters" or "samples", got {self.score!r}')
        if not 2 <= self.k_min <= self.k_max:
            raise ValueError(
                f"subgroups.k_min and k_max must be 2 <= k_min <= k_max, got {self.k_min} and {self.k_max}"
            )
        for name in ("dimensions", "overcluster", "n_init", "min_part"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"subgroups.{name} must be at least 1, got {value}")
        if self.min_val_part < 0:
            raise ValueError(f"subgroups.min_val_part must be at least 0, got {self.min_val_part}")
        if not 0 <= self.min_part_share < 1:
            raise ValueError(f"subgroups.min_part_share must be in [0, 1), got {self.min_part_share}")
        if self.silhouette_samples <= self.k_max:
            raise ValueError(
                f"subgroups.silhouette_samples must be more than k_max={self.k_max}, "
                f"got {self.silhouette_samples}"
            )


class ClassClusters:
    """The clusters of one class, fitted to its training samples.

    Args:
        rows: [n, D] fp64 on the CPU, the training samples.
        config: how to cluster.
        losses: [n], the classification losses of the samples; None: not known.
        val_rows: [m, D], the validation samples of the class; None: not known, then ``min_val_part`` does not
            apply.

    Attributes:
        groups: [n] int64 in [0, size), the groups of the training samples; each group has one.
        size: number of groups.
        silhouette: of the clusters before they are split, in [-1, 1]; 0 for one group.
    """

    def __init__(
        self,
        rows: Tensor,
        config: SubgroupConfig,
        losses: Tensor | None = None,
        val_rows: Tensor | None = None,
    ) -> None:
        self._config = config
        self._reducer: Any = None
        self._clusterer: Any = None
        self._clusters = 0
        self._parts: list[Any] = []
        self.size, self.silhouette = 1, 0.0
        self.groups = torch.zeros(len(rows), dtype=torch.int64)
        k_max = min(config.k_max, len(rows.unique(dim=0)) - 1)  # some cluster needs two different samples
        if k_max < config.k_min:
            return
        with _threads(rows.numel()):
            self._reducer = _reducer(config, len(rows), rows.shape[1])
            points = rows.numpy() if self._reducer is None else self._reducer.fit_transform(rows.numpy())
            generator = torch.Generator().manual_seed(config.seed)
            self._sampled = torch.randperm(len(rows), generator=generator)[: config.silhouette_samples]
            if not self._choose(points, k_max):
                return
            parts = self._split(points)
            kept = self._kept(points, parts, losses, val_rows)
            self._number_groups(parts, kept)
            self.groups = self._number[parts]

    def predict(self, rows: Tensor) -> Tensor:
        """Groups [M] int64 of other samples of the class; -1 for clusters without a training sample."""
        if self._clusterer is None:
            return torch.zeros(len(rows), dtype=torch.int64)
        with _threads(rows.numel()):
            return self._number[self._part_of(self._reduced(rows))]

    def _reduced(self, rows: Tensor) -> Any:
        return rows.numpy() if self._reducer is None else self._reducer.transform(rows.numpy())

    def _choose(self, points: Any, k_max: int) -> bool:
        """Fit the clustering with the best score; False if all of them have one cluster."""
        best: float | None = None
        for k in range(self._config.k_min, k_max + 1):
            clusterer = _fit_quietly(_clusterer(self._config, k, points), points)
            found = _predicted(clusterer, points)[self._sampled]
            if len(found.unique()) < 2:
                continue
            values = _silhouettes(points[self._sampled.numpy()], found)
            by_cluster = [values[found == label].mean() for label in found.unique()]
            score = float((torch.stack(by_cluster) if self._config.score == "clusters" else values).mean())
            if best is None or score > best:
                best, self._clusterer, self._clusters = score, clusterer, k
        if best is None:
            return False
        self.silhouette = best
        return True

    def _split(self, points: Any) -> Tensor:
        """Fit the parts of every cluster; returns the part of each sample, [n]."""
        clusters = _predicted(self._clusterer, points)
        for cluster in range(self._clusters):
            members = points[(clusters == cluster).numpy()]
            count = min(self._config.overcluster, len(torch.as_tensor(members).unique(dim=0)))
            split = _fit_quietly(_clusterer(self._config, count, members), members) if count > 1 else None
            self._parts.append(split)
        return self._part_of(points)

    def _part_of(self, points: Any) -> Tensor:
        """Part p of cluster c has the number c * overcluster + p."""
        clusters = _predicted(self._clusterer, points)
        parts = clusters * self._config.overcluster
        for cluster, split in enumerate(self._parts):
            members = clusters == cluster
            if split is not None and members.any():
                parts[members] += _predicted(split, points[members.numpy()])
        return parts

    def _kept(self, points: Any, parts: Tensor, losses: Tensor | None, val_rows: Tensor | None) -> set[int]:
        """The parts that become groups of their own."""
        config, sampled = self._config, self._sampled
        if config.overcluster == 1:
            return set()
        clusters, seen_points = parts // config.overcluster, points[sampled.numpy()]
        before = _silhouettes(seen_points, clusters[sampled])
        after = _silhouettes(seen_points, parts[sampled])
        in_val = None
        if val_rows is not None and config.min_val_part > 0:
            in_val = torch.zeros(0, dtype=torch.int64)
            if len(val_rows):
                in_val = self._part_of(self._reduced(val_rows))
        least = max(config.min_part, config.min_part_share * len(parts))
        kept = set()
        for part in parts.unique().tolist():
            members, seen = parts == part, parts[sampled] == part
            if members.sum() < least or not seen.any():
                continue
            if in_val is not None and (in_val == part).sum() < config.min_val_part:
                continue
            if not after[seen].mean() > before[seen].mean().clamp(min=0):
                continue
            whole = clusters == part // config.overcluster
            if losses is not None and losses[members].mean() < losses[whole].mean():
                continue
            kept.add(part)
        return kept

    def _number_groups(self, parts: Tensor, kept: set[int]) -> None:
        """Number the groups without gaps: of each cluster its rest, then its kept parts."""
        factor = self._config.overcluster
        self._number = torch.full((self._clusters * factor,), -1)
        self.size, there = 0, parts.unique()
        for cluster in range(self._clusters):
            mine = there[there // factor == cluster].tolist()
            if any(part not in kept for part in mine):
                self._number[cluster * factor : (cluster + 1) * factor] = self.size
                self.size += 1
            for part in mine:
                if part in kept:
                    self._number[part] = self.size
                    self.size += 1


def _predicted(clusterer: Any, points: Any) -> Tensor:
    return torch.as_tensor(clusterer.predict(points)).long()


def _silhouettes(points: Any, labels: Tensor) -> Tensor:
    """Silhouette of every sample, [n] fp64; 0 where the number of clusters leaves it undefined."""
    from sklearn.metrics import silhouette_samples

    if not 2 <= len(labels.unique()) < len(points):
        return torch.zeros(len(points), dtype=torch.float64)
    return torch.as_tensor(silhouette_samples(points, labels.numpy())).double()


def _threads(size: int) -> Any:
    from threadpoolctl import threadpool_limits

    # Threads do not speed up small inputs and are slow on a busy machine.
    return threadpool_limits(1 if size < _MULTITHREADING_SIZE else None)


def _reducer(config: SubgroupConfig, samples: int, width: int) -> Any:
    if config.reduce == "none":
        return None
    dimensions = min(config.dimensions or _DIMENSIONS[config.reduce], samples - 1, width)
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
        n_components=dimensions,
        random_state=config.seed,
        n_jobs=1,  # a seed allows one thread
        min_dist=0.0,
        n_neighbors=min(_NEIGHBOURS, samples - 1),
    )


def _clusterer(config: SubgroupConfig, k: int, points: Any) -> Any:
    if config.cluster == "kmeans":
        from sklearn.cluster import KMeans

        return KMeans(k, n_init=config.n_init, random_state=config.seed)
    from sklearn.mixture import GaussianMixture

    samples, width = points.shape
    # A full covariance overfits without clearly more samples than dimensions.
    covariance = "full" if samples >= 2 * k * width else "diag"
    return GaussianMixture(k, covariance_type=covariance, n_init=config.n_init, random_state=config.seed)


def _fit_quietly(clusterer: Any, points: Any) -> Any:
    """Fit without convergence warnings; a fit that does not converge has a poor silhouette."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return clusterer.fit(points)
