"""Weighted k-nearest-neighbour classification by cosine (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pysupcon.evaluators.base import FeatureSplits, Result, accuracy_results, class_index


@dataclass
class KNNConfig:
    """Weighted k-NN: the k nearest training samples vote for their class with exp(cosine / temperature), or
    with the cosine."""

    k: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 100, 200])
    """Numbers of neighbours, each reported. Those above half of the training set are left out: they say more
    about the sizes of the classes than about neighbours."""

    temperature: float = 0.07
    """votes=exp only: temperature of the votes, on the scale of the cosine."""

    chunk_bytes: int = 1 << 26
    """Memory of one block of similarities (test rows x all training rows), in bytes."""

    votes: Literal["exp", "cosine"] = "exp"
    """exp: a neighbour votes with exp(cosine / temperature); cosine: with its cosine, as in SINCERE's public
    code."""

    def __post_init__(self) -> None:
        if not self.k or any(k < 1 for k in self.k):
            raise ValueError(f"knn.k must be one or more positive numbers of neighbours, got {self.k}")
        if not self.temperature > 0:
            raise ValueError(f"knn.temperature must be > 0, got {self.temperature}")
        if self.votes not in ("exp", "cosine"):
            raise ValueError(f"knn.votes must be exp or cosine, got {self.votes!r}")
        if self.chunk_bytes < 1:
            raise ValueError(f"knn.chunk_bytes must be positive, got {self.chunk_bytes}")


def usable_k(k: Sequence[int], train_size: int) -> list[int]:
    """The distinct numbers of neighbours that are at most half of ``train_size``, ascending."""
    return [number for number in sorted(set(k)) if 2 * number <= train_size]


def similarity_chunks(
    queries: Tensor, bank: Tensor, chunk_bytes: int, progress: bool = False, description: str = "k-NN"
) -> Iterator[tuple[slice, Tensor]]:
    """Yield cosines of ``queries`` [M, D] and ``bank`` [N, D] in blocks of query rows: (rows, cosines [m,
    N]).

    Computed in fp32, or in fp64 for fp64 features. Rows of length zero have cosine 0.
    """
    dtype = torch.promote_types(bank.dtype, torch.float32)
    bank = F.normalize(bank.to(dtype), dim=1)
    rows = max(1, chunk_bytes // (bank.element_size() * len(bank)))
    starts: Iterable[int] = range(0, len(queries), rows)
    if progress:
        from tqdm import tqdm

        starts = tqdm(starts, desc=description, unit="block", leave=False, delay=2, disable=None)
    for start in starts:
        part = slice(start, min(start + rows, len(queries)))
        yield part, F.normalize(queries[part].to(dtype), dim=1) @ bank.T


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, chunk_bytes: int = 1 << 26, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The k' = min(k, N) most similar rows of ``bank`` [N, D] for each of ``queries`` [M, D] (exact search).

    Returns:
        Cosines [M, k'] in descending order, and row indices in ``bank`` [M, k'] int64.
    """
    k = min(k, len(bank))
    cosines = queries.new_empty(len(queries), k, dtype=torch.promote_types(bank.dtype, torch.float32))
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for rows, block in similarity_chunks(queries, bank, chunk_bytes, progress):
        cosines[rows], indices[rows] = block.topk(k, dim=1)
    return cosines, indices


def weighted_vote(
    cosines: Tensor, neighbour_classes: Tensor, classes: int, temperature: float | None
) -> Tensor:
    """Class with the largest sum of weights exp(cosine / temperature), or of cosines, among those of the
    neighbours; the lower one on a tie.

    Args:
        cosines: [M, k] in descending order.
        neighbour_classes: [M, k] int64 in [0, classes).
        classes: number of classes.
        temperature: temperature of the weights; None: the weights are the cosines.

    Returns:
        [M] int64.
    """
    # Subtracting the largest cosine changes no vote and avoids overflow of exp.
    weights = cosines if temperature is None else ((cosines - cosines[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, neighbour_classes, weights)
    if temperature is None:  # a sum of negative cosines is below the 0 of a class without neighbours
        present = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, neighbour_classes, True)
        votes = votes.masked_fill(~present, -torch.inf)
    return votes.argmax(dim=1)


class KNN:
    """Yields ``knn/k=K/{fine,coarse}/accuracy`` for every K of ``config.k`` up to half of the training set.

    Labels of one level (every coarse class is one fine class) give the results of ``fine`` only.
    """

    name: ClassVar[str] = "knn"
    units: ClassVar[Mapping[str, str]] = {"accuracy": "fraction"}

    meanings: ClassVar[Mapping[str, str]] = {
        "fine/accuracy": "votes of the k nearest training samples by cosine, fine labels",
        "coarse/accuracy": "votes of the k nearest training samples by cosine, coarse labels",
    }
    headline: ClassVar[Sequence[str]] = ("k=1/fine/accuracy", "k=20/fine/accuracy")

    def __init__(self, config: KNNConfig | None = None) -> None:
        self.config = config or KNNConfig()

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        config, train, test = self.config, splits.train, splits.test
        numbers = usable_k(config.k, len(train))
        if not numbers:
            return
        cosines, indices = nearest_neighbours(
            test.features, train.features, max(numbers), chunk_bytes=config.chunk_bytes, progress=progress
        )
        # On the CPU the M x k votes are summed in a fixed order.
        cosines, indices = cosines.cpu(), indices.cpu()
        temperature = config.temperature if config.votes == "exp" else None
        for level in splits.levels:
            labels, truth = train.labels(level).cpu(), test.labels(level).cpu()
            classes = labels.unique()
            neighbour_classes = class_index(labels, classes)[indices]
            for k in numbers:
                predicted = weighted_vote(cosines[:, :k], neighbour_classes[:, :k], len(classes), temperature)
                yield from accuracy_results(f"knn/k={k}/{level}", classes[predicted], truth)
