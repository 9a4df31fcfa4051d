"""Probes that are fitted to features of passes over augmented training images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.feature_cases import numbers, splits
from torch import Tensor

from pysupcon.evaluators import (
    KNN,
    CoarseToFine,
    CoarseToFineConfig,
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    Geometry,
    LinearProbe,
    LinearProbeConfig,
    OwnEvaluator,
    ProbeConfig,
    Separation,
)
from pysupcon.evaluators.linear_probe import fit_probe
from pysupcon.evaluators.passes import standardization

SOLVERS = ["logistic", "sgd", "adamw"]
FAST: dict[str, Any] = {"epochs": 6, "learning_rates": [0.05], "penalties": [1e-2]}


def noisy(train: FeatureSet, passes: int, noise: float = 1.0) -> Tensor:
    """Features of "augmented" images, fp64 [passes, N, D]."""
    generator = torch.Generator().manual_seed(3)
    shape = (passes, *train.features.shape)
    return train.features + noise * torch.randn(shape, generator=generator, dtype=torch.float64)


def augmented(passes: int = 3) -> FeatureSplits:
    data = splits(distance=0.7)
    return replace(data, augmented=noisy(data.train, passes))


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_passes_that_are_the_features_change_nothing(solver: Any, standardize: bool) -> None:
    """One pass exactly; three of sgd and adamw too, as an epoch takes one."""
    data = splits(distance=0.7)
    config = ProbeConfig(solver=solver, standardize=standardize, **FAST)
    plain = fit_probe(data.train, data.val, "fine", config)
    one = fit_probe(data.train, data.val, "fine", config, augmented=data.train.features[None])
    assert torch.equal(one.weight, plain.weight)
    assert torch.equal(one.bias, plain.bias)
    same = data.train.features.expand(3, -1, -1)
    three = fit_probe(data.train, data.val, "fine", config, augmented=same)
    if solver == "logistic":  # the penalty is relative to the mean over all rows
        torch.testing.assert_close(three.weight, plain.weight, rtol=0, atol=2e-3)
    else:
        torch.testing.assert_close(three.weight, plain.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("standardize", [True, False])
def test_logistic_takes_all_passes_at_once(standardize: bool) -> None:
    data = augmented()
    train, passes = data.train, data.augmented
    assert passes is not None
    config = ProbeConfig(standardize=standardize, penalties=[1e-2])
    found = fit_probe(train, data.val, "fine", config, augmented=passes)
    together = FeatureSet(passes.flatten(0, 1), train.coarse.repeat(3), train.fine.repeat(3))
    expected = fit_probe(together, data.val, "fine", config)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=1e-6)
    plain = fit_probe(train, data.val, "fine", config)
    assert (found.weight - plain.weight).abs().max() > 0.05


@pytest.mark.parametrize("solver", ["sgd", "adamw"])
@pytest.mark.parametrize("by", ["epochs", "steps"])
def test_an_epoch_takes_one_pass_and_the_passes_take_turns(
    solver: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row i of pass r holds the values r and i: each epoch sees all rows of one pass. 120 rows in batches of
    32 are 4 steps an epoch."""
    data = splits()
    rows = torch.arange(120.0, dtype=torch.float64)
    passes = torch.stack([torch.stack([torch.full_like(rows, r), rows], dim=1) for r in range(3)])
    train, val = (FeatureSet(s.features[:, :2], s.coarse, s.fine) for s in (data.train, data.val))
    seen: list[Tensor] = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, batch: (seen.append(batch), forward(self, batch))[1]
    )
    length: dict[str, Any] = {"epochs": 5} if by == "epochs" else {"steps": 20}
    config = ProbeConfig(
        solver=solver, standardize=False, learning_rates=[1e-6, 1e-5], batch_size=32, **length
    )
    fit_probe(train, val, "fine", config, augmented=passes)
    assert len(seen) == 2 * 20, "as many steps as without augmentation"
    for epoch in range(10):
        batch = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert batch[:, 0].unique().tolist() == [epoch % 5 % 3]
        assert batch[:, 1].sort().values.tolist() == rows.tolist()


def test_statistics_of_several_passes() -> None:
    passes = noisy(splits().train, 4, noise=3.0) * torch.logspace(-3, 3, 8, dtype=torch.float64)
    passes[..., 5] = 1 / 3
    mean, std = standardization(passes)
    rows = passes.flatten(0, 1)
    expected = rows.std(dim=0, correction=0)
    expected[5] = 1.0
    torch.testing.assert_close(mean, rows.mean(dim=0))
    torch.testing.assert_close(std, expected)
    # Passes that are constant, each at its own value, are not a constant feature.
    steps = torch.arange(2.0, dtype=torch.float64)[:, None, None].expand(2, 5, 1)
    assert standardization(steps)[1].tolist() == [0.5]


def test_both_probes_take_their_own_number_of_passes() -> None:
    data = augmented(3)
    assert data.augmented is not None
    for count in (0, 1, 3):
        given = None if count == 0 else data.augmented[:count]
        probe = LinearProbeConfig(level="fine", augmented_passes=count, penalties=[1e-2])
        expected = fit_probe(data.train, data.val, "fine", probe, augmented=given).val_accuracy
        assert numbers(LinearProbe(probe)(data))["linear_probe/fine/val_accuracy"] == expected
        both = CoarseToFineConfig(augmented_passes=count, penalties=[1e-2])
        found = numbers(CoarseToFine(both)(data))
        assert found["coarse_to_fine/fine/val_accuracy"] == expected
        # The most frequent classes are those of the images, not of the passes.
        plain = numbers(CoarseToFine(CoarseToFineConfig(penalties=[1e-2]))(data))
        for name in plain:
            if name.endswith("/chance"):
                assert found[name] == plain[name]


def test_the_other_evaluators_see_real_images_only() -> None:
    data = augmented()
    plain = replace(data, augmented=None)
    for evaluator in (KNN(), Geometry(), Separation()):
        assert numbers(evaluator(data)) == numbers(evaluator(plain))
    seen: list[object] = []

    def own(features: FeatureSplits) -> dict[str, float]:
        seen.append(features.augmented)
        return {"x": 0.0}

    assert list(OwnEvaluator(own, "own")(data)) == [("own/x", 0.0)]
    assert seen == [None]


def test_splits_carry_the_passes_along() -> None:
    data = augmented()
    assert data.augmented is not None
    copy = data.copy()
    assert copy.augmented is not None
    assert torch.equal(copy.augmented, data.augmented)
    copy.augmented.zero_()
    assert data.augmented.abs().max() > 0
    some = data.labelled(4)
    assert torch.equal(some.augmented, data.augmented[:, data.train.fine != 4])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (torch.zeros(120, 8), r"augmented must have the shape \[R, N, D\] .*\[120, 8\].* got \[120, 8\]"),
        (torch.zeros(2, 119, 8), r"got \[2, 119, 8\]"),
        (torch.zeros(0, 120, 8), r"got \[0, 120, 8\]"),
        (torch.zeros(2, 120, 8, dtype=torch.int64), "augmented must be floating point, got torch.int64"),
        (torch.full((2, 120, 8), torch.nan), "augmented must be finite"),
    ],
)
def test_passes_that_do_not_fit(passes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(splits(), augmented=passes)


def test_missing_passes_are_refused() -> None:
    for data, there in ((splits(), 0), (augmented(2), 2)):
        with pytest.raises(ValueError, match=rf"augmented_passes=3 needs as many passes .* got {there}"):
            list(LinearProbe(LinearProbeConfig(augmented_passes=3))(data))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="augmented_passes must be at least 0, got -1"):
        LinearProbeConfig(augmented_passes=-1)
    with pytest.raises(ValueError, match=r"augmented_passes must be at most epochs=5, .* got 6"):
        CoarseToFineConfig(solver="adamw", epochs=5, augmented_passes=6)
    CoarseToFineConfig(epochs=5, augmented_passes=6)  # logistic has no epochs
    config = EvaluationConfig(
        evaluators=["knn", "coarse_to_fine"],
        coarse_to_fine=CoarseToFineConfig(augmented_passes=2),
        linear_probe=LinearProbeConfig(augmented_passes=9),
    )
    assert config.augmented_passes() == {"coarse_to_fine": 2}, "only what runs"
