"""Separation of the classes: nearest cosines of each test sample (SINCERE, arXiv 2309.14277)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysupcon.evaluators.base import FeatureSet, FeatureSplits, Level, Result
from pysupcon.evaluators.knn import similarity_chunks
from pysupcon.evaluators.metrics import metric_results


@dataclass
class SeparationConfig:
    """Nearest training sample of the same class (target) and of another class (noise)."""

    chunk_bytes: int = 1 << 26
    """Memory of one block of similarities (test rows x all training rows), in bytes."""

    per_class: bool = True
    """Also report ROC AUC and average precision of every class."""

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1:
            raise ValueError(f"separation.chunk_bytes must be positive, got {self.chunk_bytes}")


def target_and_noise(
    train: FeatureSet, test: FeatureSet, level: Level, *, chunk_bytes: int = 1 << 26, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Largest cosine of each test sample to training samples of its class and of other classes.

    Returns:
        Target [N] and noise [N] cosines; -inf without such a training sample.
    """
    labels, truth = train.labels(level), test.labels(level)
    dtype = torch.promote_types(train.features.dtype, torch.float32)
    target = test.features.new_empty(len(test), dtype=dtype)
    noise = torch.empty_like(target)
    for rows, block in similarity_chunks(
        test.features, train.features, chunk_bytes, progress, description="separation"
    ):
        same = truth[rows, None] == labels
        target[rows] = block.masked_fill(~same, -torch.inf).amax(dim=1)
        noise[rows] = block.masked_fill(same, -torch.inf).amax(dim=1)
    return target, noise


class Separation:
    """Yields, under ``separation/{fine,coarse}/``, over the test samples:

    - ``target_median``, ``noise_median``: medians of the largest cosine to training samples of the same class
      and of other classes;
    - ``margin``: the difference of the two medians, |target - noise|;
    - ``roc_auc``, ``average_precision``: of target cosines against noise cosines, over all classes;
    - ``class=C/roc_auc``, ``class=C/average_precision``: the same for the test samples of class C;
    - the outcomes ``target``, ``noise`` and ``class``.

    Samples without a target or a noise cosine are ignored; a level without other samples yields nothing.
    Labels of one level give the results of ``fine`` only.
    """

    name: ClassVar[str] = "separation"
    units: ClassVar[Mapping[str, str]] = {
        "target_median": "cosine",
        "noise_median": "cosine",
        "margin": "cosine",
        "roc_auc": "fraction",
        "average_precision": "fraction",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "target_median": "nearest training sample of the same class, median cosine",
        "noise_median": "nearest training sample of another class, median cosine",
        "margin": "difference of the two medians",
        "roc_auc": "nearest cosines of the own class against those of other classes; 50 %: no separation",
        "average_precision": "area under the precision-recall curve of the same cosines",
    }
    headline: ClassVar[Sequence[str]] = ("fine/roc_auc", "coarse/roc_auc")

    def __init__(self, config: SeparationConfig | None = None) -> None:
        self.config = config or SeparationConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        for level in splits.levels:
            pair = target_and_noise(
                splits.train, splits.test, level, chunk_bytes=self.config.chunk_bytes, progress=progress
            )
            target, noise = (values.cpu() for values in pair)
            known, labels = target.isfinite() & noise.isfinite(), splits.test.labels(level).cpu()
            if not known.any():
                continue
            outcomes = {
                "target": torch.where(known, target, torch.nan),
                "noise": torch.where(known, noise, torch.nan),
                "class": labels,
            }
            prefix = f"separation/{level}"
            metrics = ["target_median", "noise_median", "margin", "roc_auc", "average_precision"]
            if self.config.per_class:
                for label in labels[known].unique().tolist():
                    metrics += [f"class={label}/roc_auc", f"class={label}/average_precision"]
            yield from metric_results(prefix, metrics, outcomes)
