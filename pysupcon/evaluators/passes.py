"""Features of one or more passes over the training samples, standardised for a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D], fp64 on the CPU, of the rows of ``features`` [N, D] or [R, N, D]; 1
    for features that are constant up to rounding."""
    passes = features if features.ndim == 3 else features[None]
    found = []
    for each in passes:  # one at a time: fp64 takes twice the memory
        x = each.to("cpu", torch.float64)
        found.append((x.mean(dim=0), x.std(dim=0, correction=0), x.abs().amax(dim=0)))
    means, stds, largest = (torch.stack(values) for values in zip(*found, strict=True))
    std = stds[0]
    if len(found) > 1:
        std = (stds.square().mean(dim=0) + means.var(dim=0, correction=0)).sqrt()
    return means.mean(dim=0), torch.where(std > 1e-6 * largest.amax(dim=0), std, 1.0)


class Passes:
    """Features of the training samples in one or more passes, standardised when they are used.

    Args:
        features: [R, N, D].
        mean, std: [D] fp64 on the CPU.
    """

    def __init__(self, features: Tensor, mean: Tensor, std: Tensor) -> None:
        self.features, self.mean, self.std = features, mean, std

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, number: int) -> Tensor:
        """A pass, [N, D] fp32 on the CPU."""
        return ((self.features[number].to("cpu", torch.float64) - self.mean) / self.std).float()

    def all(self) -> Tensor:
        """[R * N, D] fp32, one pass after the other."""
        return self[0] if len(self) == 1 else torch.cat([self[number] for number in range(len(self))])
