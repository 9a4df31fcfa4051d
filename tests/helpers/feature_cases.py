"""Synthetic features with known classes for the tests of the evaluators."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pysupcon.evaluators import FeatureSet, FeatureSplits, Result

FINE_OF_COARSE = 3  # fine classes 0..5, coarse class = fine // 3


def blobs(
    n: int, *, width: int = 8, distance: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> FeatureSet:
    """Gaussian blobs with standard deviation 1 around six centres, three centres per coarse class."""
    centres = torch.randn(6, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(n) % 6
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return FeatureSet((distance * centres[fine] + noise).to(dtype), fine // FINE_OF_COARSE, fine)


def splits(distance: float = 2.0, train: int = 120, dtype: torch.dtype = torch.float64) -> FeatureSplits:
    return FeatureSplits(*(blobs(n, distance=distance, seed=n, dtype=dtype) for n in (train, 61, 90)))


def numbers(results: Iterable[Result]) -> dict[str, float]:
    """The results that are numbers, without the outcomes per sample."""
    return {name: value for name, value in results if isinstance(value, float)}
