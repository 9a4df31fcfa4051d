"""Does a loss notice which sample of a class lies where? (Thanos, arXiv 2204.07596)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def permute_within_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation [N] int64 of the samples that keeps every class in place, ``labels`` [N]."""
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
    """Largest relative change of ``loss`` when samples of one class swap their embeddings.

    0 (but for rounding) for every loss that sees embeddings and class labels only, such as SupCon, SINCERE
    and L_spread: it cannot keep subclasses together. An autoencoder's reconstruction error is tied to the
    images, and changes.

    Args:
        loss: features like ``features`` to a scalar; whatever else it needs it holds itself, in sample order.
        features: [N, D], or [N, V, D]: a sample's views move together.
        labels: [N] int64.

    Returns:
        max over the permutations of |loss(permuted) - loss| / |loss|, the absolute change where loss is 0.
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be of shape [N]=[{len(features)}] (one label per sample), got {list(labels.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain = loss(features).item()
        changes = [
            abs(loss(features[permute_within_classes(labels, generator)]).item() - plain)
            for _ in range(permutations)
        ]
    return max(changes) / (abs(plain) or 1.0)
