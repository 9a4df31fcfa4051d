"""Two-dimensional projection of features, for plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ProjectionConfig:
    """The two-dimensional plot of the normalised test features."""

    method: Literal["tsne", "pca"] = "tsne"
    """"tsne", which preserves neighbourhoods but not distances between clusters, or "pca", which is linear
    and preserves distances along the two directions of largest variance."""

    max_points: int = 1000
    """Larger test splits are randomly subsampled to this size."""

    seed: int = 0
    """Seed of the subsample and of t-SNE."""

    def __post_init__(self) -> None:
        if self.method not in ("tsne", "pca"):
            raise ValueError(f'projection.method must be "tsne" or "pca", got {self.method!r}')
        if self.max_points < 2:
            raise ValueError(f"projection.max_points must be at least 2, got {self.max_points}")


def project(features: Tensor, config: ProjectionConfig) -> tuple[Tensor, Tensor]:
    """Two-dimensional points for ``features`` [N, D], normalised first.

    Returns:
        Points [M, 2] fp32 and their row indices [M] int64, ascending, M = min(N, max_points).
    """
    n = len(features)
    rows = torch.arange(n)
    if n > config.max_points:
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randperm(n, generator=generator)[: config.max_points].sort().values
    chosen = F.normalize(features.detach().cpu()[rows].double(), dim=1)
    if config.method == "tsne" and len(rows) > 3:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        # t-SNE recommends at least three points per unit of perplexity.
        perplexity = min(30.0, (len(rows) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=config.seed)
        # Threads do not speed up small inputs and are slow on a busy machine.
        with threadpool_limits(1 if len(rows) <= 2000 else None):
            points = torch.from_numpy(tsne.fit_transform(chosen.float().numpy()))
        return points.float(), rows
    centred = chosen - chosen.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    # The sign of a singular vector is arbitrary, so its largest entry is made positive.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    points = centred @ (directions * largest.sign()).T
    return F.pad(points, (0, 2 - points.shape[1])).float(), rows
