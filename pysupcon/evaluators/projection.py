"""Features in two dimensions, for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ProjectionConfig:
    """The two-dimensional picture of the test features, on the unit sphere."""

    method: Literal["tsne", "pca"] = "tsne"
    """"tsne", which shows neighbourhoods (distances between groups mean little), or "pca", which is linear
    and shows true distances along the two directions of most variance."""

    max_points: int = 1000
    """A seeded sample of the test split beyond this many."""

    seed: int = 0
    """Of that sample and of t-SNE."""

    def __post_init__(self) -> None:
        if self.method not in ("tsne", "pca"):
            raise ValueError(f'projection.method must be "tsne" or "pca", got {self.method!r}')
        if self.max_points < 2:
            raise ValueError(f"projection.max_points must be at least 2, got {self.max_points}")


def project(features: Tensor, config: ProjectionConfig) -> tuple[Tensor, Tensor]:
    """Two-dimensional points for ``features`` [N, D], normalised first.

    Returns:
        points [M, 2] fp32 and the rows they stand for [M] int64, ascending, M = min(N, max_points).
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

        # The perplexity must be below the number of points; three times it is t-SNE's own advice.
        perplexity = min(30.0, (len(rows) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=config.seed)
        # Few points gain nothing from threads, and lose much where the threads wait for a busy processor.
        with threadpool_limits(1 if len(rows) <= 2000 else None):
            points = torch.from_numpy(tsne.fit_transform(chosen.float().numpy()))
        return points.float(), rows
    centred = chosen - chosen.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    # The sign of a singular vector is arbitrary: its largest entry is made positive.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    points = centred @ (directions * largest.sign()).T
    return F.pad(points, (0, 2 - points.shape[1])).float(), rows
