"""Rows whose labels are not known change no measure of any evaluator."""

from __future__ import annotations

import pytest
import torch
from helpers.feature_cases import blobs, numbers, splits

from pysupcon.evaluators import (
    KNN,
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    LinearHead,
    LinearProbeConfig,
    WorstGroupConfig,
    available_evaluators,
    build_evaluators,
)
from pysupcon.evaluators.group_dro import HeadConfig

IGNORED = -100


def with_unknown_rows(known: FeatureSet, seed: int) -> FeatureSet:
    """Every third row is far away and has an unknown coarse label, fine label or both."""
    n = len(known)
    generator = torch.Generator().manual_seed(seed)
    rows = 100 * torch.randn(n // 2, known.features.shape[1], generator=generator, dtype=torch.float64)
    kind = torch.arange(n // 2) % 3
    coarse = torch.where(kind == 0, 1, IGNORED)
    fine = torch.where(kind == 1, 4, IGNORED)
    joined = [torch.cat(pair) for pair in (
        (known.features, rows), (known.coarse, coarse), (known.fine, fine)
    )]  # fmt: skip
    place = torch.cat([torch.arange(n) * 3 // 2 * 2, torch.arange(n // 2) * 6 + 1]).argsort(stable=True)
    return FeatureSet(*(column[place] for column in joined))


def test_every_evaluator() -> None:
    known = splits(distance=1.0)
    head = LinearHead(torch.ones(2, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    mixed = FeatureSplits(
        *(with_unknown_rows(split, seed) for seed, (_, split) in enumerate(known.items())), head=head
    )
    assert len(mixed.test) > len(known.test)
    cleaned = mixed.labelled(IGNORED)
    assert cleaned.head is head
    for (_, split), (_, expected) in zip(cleaned.items(), known.items(), strict=True):
        for name in ("features", "coarse", "fine"):
            assert torch.equal(getattr(split, name), getattr(expected, name))
    fast = EvaluationConfig(
        evaluators=available_evaluators(),
        linear_probe=LinearProbeConfig(penalties=[1e-2]),
        worst_group=WorstGroupConfig(methods=["erm"], head=HeadConfig(epochs=2)),
    )
    for evaluator in build_evaluators(fast):
        assert numbers(evaluator(cleaned)) == numbers(evaluator(known)), evaluator.name
    accuracy = "knn/k=1/fine/accuracy"  # the unknown rows would have changed it
    assert numbers(KNN()(mixed))[accuracy] < numbers(KNN()(cleaned))[accuracy]


def test_a_split_without_known_rows() -> None:
    known = blobs(12)
    unknown = FeatureSet(known.features, known.coarse, torch.full_like(known.fine, IGNORED))
    data = FeatureSplits(known, unknown, known)
    with pytest.raises(
        ValueError,
        match=r"^the val split holds no row of a known class: all 12 rows have the label ignore_index=-100$",
    ):
        data.labelled(IGNORED)
