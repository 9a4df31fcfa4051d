"""Share of the samples of a batch that have a partner of their class: formulas against the samplers."""

from __future__ import annotations

import pytest
import torch

from pysupcon.data.partners import balanced_share, per_class_share, shuffled_share
from pysupcon.data.samplers import BalancedBatchSampler, PerClassBatchSampler, ShuffledBatchSampler

HUNDRED = torch.arange(5000) % 100
UNEQUAL = torch.repeat_interleave(torch.arange(12), torch.tensor([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144]))


def measured(sampler: ShuffledBatchSampler, labels: torch.Tensor) -> float:
    """Share in the batches of the sampler, of the samples with a label of at least 0. Copies of a sample are
    no partners."""
    alone, all_samples = 0, 0
    for batch in sampler:
        rows = torch.tensor([sample for sample, _ in batch])
        drawn = labels[rows][labels[rows] >= 0]
        distinct = labels[rows.unique()]
        found, counts = distinct[distinct >= 0].unique(return_counts=True)
        alone += int(torch.isin(drawn, found[counts == 1]).sum())
        all_samples += len(drawn)
    return 1 - alone / all_samples


@pytest.mark.parametrize(
    ("classes", "size", "expected"),
    [(100, 64, 0), (100, 100, 0), (100, 128, 0.4375), (100, 199, 2 * 99 / 199), (100, 200, 1), (7, 64, 1)],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_balanced_batches(classes: int, size: int, expected: float, processes: int) -> None:
    """The part of each process counts as a batch."""
    counts = torch.full((classes,), 50)
    assert balanced_share(torch.arange(classes), counts, size, processes) == pytest.approx(expected)
    labels = torch.arange(50 * classes) % classes
    options = {"world_size": processes, "rank": processes - 1}
    steps = 10
    sampler = BalancedBatchSampler(labels, size * processes, seed=0, steps=steps, **options)
    # Among processes, the additional samples of the single classes go to one rank after the other.
    tolerance = 1e-9 if processes == 1 else 0.03
    assert measured(sampler, labels) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("labels", [HUNDRED, UNEQUAL], ids=["100 classes", "unequal classes"])
@pytest.mark.parametrize("size", [2, 16, 64, 128])
def test_shuffled_batches(labels: torch.Tensor, size: int) -> None:
    expected = shuffled_share(torch.bincount(labels), size)
    found = measured(ShuffledBatchSampler(labels, size, seed=0, steps=40_000 // size), labels)
    assert found == pytest.approx(expected, abs=0.015)


def test_known_values_of_shuffled_batches() -> None:
    assert shuffled_share(torch.full((100,), 50), 64) == pytest.approx(0.46, abs=0.01)
    assert shuffled_share(torch.full((100,), 50), 128) == pytest.approx(0.72, abs=0.01)
    assert shuffled_share(torch.full((1000,), 1300), 256) == pytest.approx(1 - 0.999**255, abs=1e-3)
    assert shuffled_share(torch.tensor([3, 0, 3]), 6) == 1
    assert shuffled_share(torch.tensor([1, 1, 2]), 4) == 0.5


def test_samples_of_unknown_class_are_no_partners() -> None:
    labels = torch.where(torch.arange(5000) % 2 == 0, HUNDRED // 10, -1)
    expected = shuffled_share(torch.bincount(labels[labels >= 0]), 16, unknown=2500)
    found = measured(ShuffledBatchSampler(labels, 16, seed=0, steps=2000), labels)
    assert found == pytest.approx(expected, abs=0.02)
    assert expected < shuffled_share(torch.bincount(labels[labels >= 0]), 16) - 0.1


@pytest.mark.parametrize("size", [4, 6, 9, 10, 14, 16, 40])
def test_batches_of_groups(size: int) -> None:
    """A partner may be of another group of the class."""
    parents = torch.tensor([0, 1, 1, 2, 3, 4, 4, 4, 5, 6])
    groups = torch.arange(1000) % 10
    counts = torch.full((10,), 100)
    sampler = BalancedBatchSampler(groups, size, seed=3, steps=2000)
    if size >= 10:  # the windows over one order of the groups give the exact mean
        assert measured(sampler, parents[groups]) == pytest.approx(
            balanced_share(parents, counts, size), abs=1e-9
        )
    else:  # over orders
        shares = [
            measured(BalancedBatchSampler(groups, size, seed=seed, steps=50), parents[groups])
            for seed in range(60)
        ]
        assert sum(shares) / 60 == pytest.approx(balanced_share(parents, counts, size), abs=0.03)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("counts", [[1, 1, 1, 10], [1, 2, 3, 4, 30], [2, 2, 2, 30], [1, 1, 2, 2, 1, 9, 40]])
@pytest.mark.parametrize("size", [5, 8, 12])
def test_copies_of_small_classes_are_no_partners(counts: list[int], size: int, processes: int) -> None:
    if size * processes > sum(counts):
        pytest.skip("a batch has at most all samples")
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = [
        measured(BalancedBatchSampler(labels, size * processes, seed=0, steps=1500, world_size=processes,
                                      rank=rank), labels)
        for rank in range(processes)
    ]  # fmt: skip
    expected = balanced_share(torch.arange(len(counts)), torch.tensor(counts), size, processes)
    assert sum(shares) / processes == pytest.approx(expected, abs=0.02)


def test_single_samples_in_known_batches() -> None:
    counts = torch.tensor([1, 1, 1, 10])
    assert balanced_share(torch.arange(4), counts, 8) == pytest.approx(0.25)
    assert per_class_share(counts) == pytest.approx(0.25)
    assert shuffled_share(counts, 8) == pytest.approx(10 / 13)


def test_single_samples_of_groups() -> None:
    """A group of one sample has partners in other groups of its class."""
    parents, counts = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([1, 1, 1, 2, 30])
    groups = torch.repeat_interleave(torch.arange(5), counts)
    for size in (5, 7, 10, 13):
        found = measured(BalancedBatchSampler(groups, size, seed=0, steps=2000), parents[groups])
        assert found == pytest.approx(balanced_share(parents, counts, size), abs=0.01)


@pytest.mark.parametrize("counts", [[1, 1, 1, 10], [1, 2, 3, 4, 30], [5, 5, 5, 5]])
def test_batches_per_class(counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for each in (2, 3):
        sampler = PerClassBatchSampler(labels, 4 * each, samples_per_class=each, seed=0, steps=1000)
        assert measured(sampler, labels) == pytest.approx(per_class_share(torch.tensor(counts)), abs=0.01)
