"""Sensitivity of a loss to permutations within a class (Thanos, arXiv 2204.07596)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def permute_within_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation [N] int64 of the samples within the classes of ``labels`` [N]."""
    order = torch.arange(len(labels))
    labels = labels.cpu()
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order.to(labels.device)


def permutation_sensitivity(
    loss: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    permutations: int = 8,
    seed: int = 0,
) -> float:
    """Largest relative change of ``loss`` when samples of one class exchange their embeddings.

    It is 0, up to rounding, for losses of embeddings and class labels only, such as SupCon, SINCERE and
    L_spread. The reconstruction error of an autoencoder depends on the images and changes.

    Args:
        loss: function of ``features`` that returns a scalar.
        features: [N, D], or [N, V, D], where the views of a sample are permuted together.
        labels: [N] int64.
        permutations: number of random permutations.
        seed: seed of the permutations.

    Returns:
        max over the permutations of |loss(permuted) - loss| / |loss|, or the absolute change if loss is 0.
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be of shape [N]=[{len(features)}] (one label per sample), got {list(labels.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        reference = loss(features).item()
        changes = [
            abs(loss(features[permute_within_classes(labels, generator)]).item() - reference)
            for _ in range(permutations)
        ]
    return max(changes) / (abs(reference) or 1.0)
