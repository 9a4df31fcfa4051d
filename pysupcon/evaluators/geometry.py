"""Geometry of the embedding: spread, subclass distances and collapse (Thanos, arXiv 2204.07596).

Symbols: f_i is a row of unit length, m the mean of all rows, m_c the mean of class c. A subclass is a fine
class within a coarse one. All values are computed in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.evaluators.base import FeatureSplits, Result


@dataclass
class GeometryConfig:
    """Distances and variances of one split's features on the unit sphere."""

    split: Literal["train", "val", "test"] = "test"
    """"train", "val" or "test"."""

    class_collapse_below: float = 0.05
    """Class collapse is reported if less than this fraction of the total variance lies within the coarse
    classes."""

    complete_collapse_below: float = 1e-3
    """Complete collapse is reported if the total variance is below this. Rows spread evenly over the sphere
    have total variance 1."""

    def __post_init__(self) -> None:
        if self.split not in ("train", "val", "test"):
            raise ValueError(f'geometry.split must be "train", "val" or "test", got {self.split!r}')
        for name in ("class_collapse_below", "complete_collapse_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"geometry.{name} must be in [0, 1], got {getattr(self, name)}")


class ClassMeans(NamedTuple):
    """Means [C, D] of the C classes that occur, and the class index of each row, [N] int64."""

    means: Tensor
    row_class: Tensor

    def residuals(self, rows: Tensor) -> Tensor:
        """f_i - m_{y_i}, [N, D]."""
        return rows - self.means[self.row_class]


def class_means(rows: Tensor, labels: Tensor) -> ClassMeans:
    """Means of ``rows`` [N, D] per distinct label in ``labels`` [N]."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, index, rows)
    return ClassMeans(sums / counts[:, None], index)


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of ``rows`` [N, D] (Roy and Vetterli 2007).

    It ranges from 1 (all rows on one line) to min(N, D), and is 0 if every row is zero.
    """
    values = torch.linalg.svdvals(rows)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _mean_distance(means: Tensor, groups: Tensor | None = None) -> float:
    """Mean distance of pairs of ``means`` [C, D], of equal ``groups`` [C] if given; 0 without pairs."""
    pairs = torch.ones(len(means), len(means), dtype=torch.bool, device=means.device).triu(1)
    if groups is not None:
        pairs &= groups[:, None] == groups[None, :]
    # The matrix-product form of the distance loses half of the digits for close means.
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")[pairs]
    return distances.mean().item() if len(distances) else 0.0


class Geometry:
    """Yields, under ``geometry/``, for rows on the unit sphere:

    - ``spread/coarse``, ``spread/fine``: mean_i ||f_i - m_{y_i}||, the within-class deviation;
      ``spread/fine`` is the within-subclass distance;
    - ``between/coarse``: mean distance between the means of two coarse classes;
    - ``between/fine_within_coarse``: mean distance between the means of two subclasses of one coarse class;
    - ``separation/fine_within_coarse``: the previous value divided by ``spread/fine``;
    - ``variance/total``: mean_i ||f_i - m||^2, from 0 (one point) to 1 (the mean is the origin);
    - ``variance/within_coarse``: fraction of it within the coarse classes; 0 is class collapse;
    - ``variance/explained_by_fine``: fraction of the variance within the coarse classes that the subclass
      means explain; 0 for collapsed classes and for classes permuted at random;
    - ``effective_rank/total``, ``effective_rank/within_coarse``: of the centred rows, and of f_i - m_{y_i};
    - ``collapse/class``, ``collapse/complete``: 1 for a collapse, else 0.

    A ratio with denominator 0 is 0. A subclass is a pair of a fine and a coarse label. Labels of one level
    give the results without ``fine`` in their names.
    """

    name: ClassVar[str] = "geometry"
    units: ClassVar[Mapping[str, str]] = {
        "coarse": "distance",
        "fine": "distance",
        "between/fine_within_coarse": "distance",
        "separation/fine_within_coarse": "ratio",
        "variance/total": "squared distance",
        "variance/within_coarse": "fraction",
        "explained_by_fine": "fraction",
        "effective_rank/total": "dimensions",
        "effective_rank/within_coarse": "dimensions",
        "class": "1 or 0",
        "complete": "1 or 0",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "spread/coarse": "mean distance of an embedding to the mean of its coarse class",
        "spread/fine": "mean distance of an embedding to the mean of its fine class",
        "between/coarse": "mean distance between two coarse classes",
        "between/fine_within_coarse": "mean distance between two fine classes of one coarse class",
        "separation/fine_within_coarse": "between/fine_within_coarse divided by spread/fine",
        "variance/total": "0: all embeddings are one point; 1: spread evenly over the sphere",
        "variance/within_coarse": "share of the variance within the coarse classes; 0: class collapse",
        "variance/explained_by_fine": "share of the variance within coarse classes between fine classes",
        "effective_rank/total": "directions that the embeddings use",
        "effective_rank/within_coarse": "the same within the coarse classes; it may exceed the total",
        "collapse/class": "each coarse class is nearly one point",
        "collapse/complete": "all embeddings are nearly one point",
    }
    headline: ClassVar[Sequence[str]] = ("spread/coarse", "effective_rank/total")

    def __init__(self, config: GeometryConfig | None = None) -> None:
        self.config = config or GeometryConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        chosen = dict(splits.items())[self.config.split]
        rows = F.normalize(chosen.features.to("cpu", torch.float64), dim=1)
        coarse, two_levels = chosen.coarse.cpu(), "coarse" in splits.levels
        subclass = torch.stack([coarse, chosen.fine.cpu()], dim=1).unique(dim=0, return_inverse=True)[1]
        by_class, by_subclass = class_means(rows, coarse), class_means(rows, subclass)
        residuals = {"coarse": by_class.residuals(rows), "fine": by_subclass.residuals(rows)}
        centred = rows - rows.mean(dim=0)

        spread = {level: residuals[level].norm(dim=1).mean().item() for level in ("coarse", "fine")}
        yield "geometry/spread/coarse", spread["coarse"]
        yield "geometry/between/coarse", _mean_distance(by_class.means)
        if two_levels:
            # All rows of a subclass have the same class, so the order of the writes does not matter.
            parent = torch.empty(len(by_subclass.means), dtype=torch.int64)
            parent[by_subclass.row_class] = by_class.row_class
            between_fine = _mean_distance(by_subclass.means, parent)
            yield "geometry/spread/fine", spread["fine"]
            yield "geometry/between/fine_within_coarse", between_fine
            yield "geometry/separation/fine_within_coarse", _ratio(between_fine, spread["fine"])

        total = centred.square().sum(dim=1).mean().item()
        within = {level: residuals[level].square().sum(dim=1).mean().item() for level in ("coarse", "fine")}
        share = _ratio(within["coarse"], total)
        yield "geometry/variance/total", total
        yield "geometry/variance/within_coarse", share
        if two_levels:
            explained = 1 - within["fine"] / within["coarse"] if within["coarse"] > 0 else 0.0
            yield "geometry/variance/explained_by_fine", explained
        yield "geometry/effective_rank/total", effective_rank(centred)
        yield "geometry/effective_rank/within_coarse", effective_rank(residuals["coarse"])
        yield "geometry/collapse/class", float(share < self.config.class_collapse_below)
        yield "geometry/collapse/complete", float(total < self.config.complete_collapse_below)
