"""Linear probes and coarse-to-fine transfer against scikit-learn and classes of known shape."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.feature_cases import blobs, numbers, splits

from pysupcon.evaluators import (
    KNN,
    CoarseToFine,
    FeatureSet,
    FeatureSplits,
    KNNConfig,
    LinearProbe,
    LinearProbeConfig,
    ProbeConfig,
)
from pysupcon.evaluators.linear_probe import _optimizer, fit_probe


@pytest.mark.parametrize("solver", ["logistic", "sgd", "adamw"])
@pytest.mark.parametrize("level", ["fine", "coarse"])
def test_probes_are_perfect_on_separable_classes(solver, level):
    data = splits(distance=20.0)
    config = LinearProbeConfig(solver=solver, level=level, epochs=40, learning_rates=[0.05])
    found = numbers(LinearProbe(config)(data))
    assert found[f"linear_probe/{level}/accuracy"] == 1.0
    assert found[f"linear_probe/{level}/val_accuracy"] == 1.0


@pytest.mark.parametrize("level", ["fine", "coarse"])  # six classes, and the two of one logit
def test_logistic_probe_equals_scikit_learn(level):
    from sklearn.linear_model import LogisticRegression

    data = splits(distance=0.7)
    labels = data.train.labels(level).numpy()
    probe = fit_probe(data.train, data.val, level, ProbeConfig(standardize=False, penalties=[1e-2]))
    reference = LogisticRegression(C=1 / (1e-2 * 120), tol=1e-8, max_iter=1000).fit(
        data.train.features.numpy(), labels
    )
    expected = reference.predict_proba(data.test.features.numpy())
    torch.testing.assert_close(
        probe.logits(data.test.features).softmax(dim=1), torch.from_numpy(expected), rtol=0, atol=2e-3
    )


def test_the_penalty_is_the_best_on_validation():
    from sklearn.linear_model import LogisticRegression

    # More noisy features than samples: weak penalties overfit.
    data = FeatureSplits(*(blobs(n, width=100, distance=0.25, seed=n) for n in (60, 300, 90)))
    penalties = [10.0, 1.0, 1e-1, 1e-3, 1e-6]
    probe = fit_probe(
        data.train, data.val, "fine", ProbeConfig(penalties=penalties, standardize=False, max_iterations=2000)
    )
    accuracies = {}
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * 60), max_iter=5000, tol=1e-6)
        model.fit(data.train.features.numpy(), data.train.fine.numpy())
        accuracies[penalty] = model.score(data.val.features.numpy(), data.val.fine.numpy())
    assert len(set(accuracies.values())) > 2, "the penalties must matter here"
    assert probe.val_accuracy == pytest.approx(max(accuracies.values()), abs=0.02)
    assert accuracies[probe.chosen] >= max(accuracies.values()) - 0.02


def test_a_tie_keeps_the_larger_penalty():
    data = splits(distance=10.0)
    probe = fit_probe(data.train, data.val, "fine", ProbeConfig(penalties=[1e-4, 1e-2, 1e-3]))
    assert probe.val_accuracy == 1.0
    assert probe.chosen == 1e-2


def test_standardized_probes_ignore_shift_and_scale_of_all_splits_but_not_of_one():
    data = splits(distance=1.5)
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)

    def moved(split: FeatureSet) -> FeatureSet:
        return FeatureSet(split.features * scale + 5 * scale, split.coarse, split.fine)

    config = LinearProbeConfig(level="fine", penalties=[1e-2])
    plain = numbers(LinearProbe(config)(data))["linear_probe/fine/accuracy"]
    together = FeatureSplits(moved(data.train), moved(data.val), moved(data.test))
    assert numbers(LinearProbe(config)(together))["linear_probe/fine/accuracy"] == pytest.approx(
        plain, abs=0.012
    )
    # The test split's own statistics must not be used: a test split that moved is misjudged.
    apart = FeatureSplits(data.train, data.val, moved(data.test))
    assert numbers(LinearProbe(config)(apart))["linear_probe/fine/accuracy"] < plain - 0.3


def test_constant_features_do_no_harm():
    data = splits(distance=8.0)

    def widened(split: FeatureSet) -> FeatureSet:
        constant = torch.full((len(split), 2), 1e3 / 3, dtype=torch.float64)
        return FeatureSet(torch.cat([split.features, constant], dim=1), split.coarse, split.fine)

    wide = FeatureSplits(*(widened(split) for _, split in data.items()))
    assert numbers(LinearProbe(LinearProbeConfig(level="fine"))(wide))["linear_probe/fine/accuracy"] == 1.0


def test_learning_rate_schedules():
    head = torch.nn.Linear(2, 2)

    def rates(config: ProbeConfig, steps: int) -> list[float]:
        count = config.epochs * steps if config.steps is None else config.steps
        optimizer, scheduler = _optimizer(head, 0.5, config, count, steps)
        seen = []
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    sgd = rates(ProbeConfig(solver="sgd", epochs=20), steps=3)
    expected = [0.5] * 12 + [0.1] * 3 + [0.02] * 3 + [0.004] * 2
    assert sgd[::3] == pytest.approx(expected)
    assert sgd[2::3] == pytest.approx(expected)
    cosine = rates(ProbeConfig(solver="adamw", epochs=4), steps=5)
    assert cosine == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    # A number of steps: the milestones are those steps, also within a pass.
    sgd = rates(ProbeConfig(solver="sgd", steps=10), steps=4)
    assert sgd == pytest.approx([0.5] * 6 + [0.1] * 2 + [0.02] + [0.004])
    cosine = rates(ProbeConfig(solver="adamw", steps=7, epochs=1), steps=4)
    assert cosine == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 7)) for step in range(7)])


@pytest.mark.parametrize("steps", [1, 4, 5, 11])  # 120 samples in batches of 32: 4 steps a pass
def test_a_number_of_steps_is_kept_exactly(steps, monkeypatch):
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (taken.append(1), step(self))[1])
    data = splits()
    config = ProbeConfig(solver="adamw", steps=steps, epochs=3, batch_size=32)
    found = fit_probe(data.train, data.val, "fine", config)
    assert len(taken) == steps
    assert found.val_accuracy == (found.predict(data.val.features) == data.val.fine).double().mean()
    if steps == 4:  # whole passes: the same as that number of epochs
        same = fit_probe(data.train, data.val, "fine", ProbeConfig(solver="adamw", epochs=1, batch_size=32))
        assert torch.equal(found.weight, same.weight)


def test_the_default_converges_on_features_of_nearly_low_rank():
    """As those of collapsed classes are after standardisation; 300 iterations do not suffice."""

    def narrow(n: int, seed: int) -> FeatureSet:
        plain = blobs(n, width=40, distance=0.5, seed=seed)
        mixing = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
        left, _, right = torch.linalg.svd(mixing)
        spectrum = torch.logspace(0, -3, 40, dtype=torch.float64)
        return FeatureSet(plain.features @ (left * spectrum) @ right, plain.coarse, plain.fine)

    train, val = narrow(300, 1), narrow(60, 2)
    assert fit_probe(train, val, "fine", ProbeConfig(penalties=[1e-5])).converged
    assert not fit_probe(train, val, "fine", ProbeConfig(penalties=[1e-5], max_iterations=300)).converged


def test_the_best_epoch_on_validation_is_kept():
    data = splits(distance=0.7)
    # A rate that throws the weights about: the last epoch is rarely the best.
    long = fit_probe(data.train, data.val, "fine", ProbeConfig(solver="sgd", epochs=20, learning_rates=[5.0]))
    short = fit_probe(data.train, data.val, "fine", ProbeConfig(solver="sgd", epochs=1, learning_rates=[5.0]))
    assert long.val_accuracy >= short.val_accuracy
    assert long.val_accuracy == (long.predict(data.val.features) == data.val.fine).double().mean()
    several = fit_probe(
        data.train, data.val, "fine", ProbeConfig(solver="sgd", epochs=20, learning_rates=[1e-6, 0.1])
    )
    assert several.chosen == 0.1


def test_classes_that_training_lacks_count_as_wrong_and_one_class_is_constant():
    data = splits(distance=8.0)
    keep = data.train.fine < 5
    train = FeatureSet(data.train.features[keep], data.train.coarse[keep], data.train.fine[keep] + 40)
    shifted = FeatureSplits(
        train, *(FeatureSet(s.features, s.coarse, s.fine + 40) for s in (data.val, data.test))
    )
    for evaluator in (LinearProbe(LinearProbeConfig(level="fine")), KNN(KNNConfig(k=[5]))):
        results = dict(evaluator(shifted))
        correct = next(value for name, value in results.items() if name.endswith("fine/correct"))
        assert torch.equal(correct, data.test.fine < 5)

    one = FeatureSplits(
        *(FeatureSet(s.features, torch.full_like(s.coarse, 7), s.fine) for _, s in data.items())
    )
    found = numbers(CoarseToFine()(one))
    assert found["coarse_to_fine/coarse/accuracy"] == found["coarse_to_fine/coarse/chance"] == 1.0
    assert found["coarse_to_fine/fine_within_coarse/accuracy"] == found["coarse_to_fine/fine/accuracy"]


def test_an_unfinished_solver_says_so():
    data = splits(distance=0.7)
    found = numbers(LinearProbe(LinearProbeConfig(level="fine", max_iterations=1, penalties=[1e-6]))(data))
    assert found["linear_probe/fine/converged"] == 0.0
    found = numbers(LinearProbe(LinearProbeConfig(level="fine"))(data))
    assert found["linear_probe/fine/converged"] == 1.0


# Coarse-to-fine


def test_collapsed_classes_transfer_at_chance():
    generator = torch.Generator().manual_seed(0)

    def collapsed(n: int) -> FeatureSet:
        fine = torch.randint(6, (n,), generator=generator)
        points = torch.tensor([[5.0, 0.0], [0.0, 5.0]])[fine // 3]
        return FeatureSet(points + 1e-3 * torch.randn(n, 2, generator=generator), fine // 3, fine)

    data = FeatureSplits(collapsed(600), collapsed(300), collapsed(600))
    found = numbers(CoarseToFine()(data))
    assert found["coarse_to_fine/coarse/accuracy"] == 1.0
    assert found["coarse_to_fine/fine_within_coarse/accuracy"] == pytest.approx(1 / 3, abs=0.08)
    assert found["coarse_to_fine/fine/accuracy"] == pytest.approx(1 / 3, abs=0.08)
    spread = numbers(CoarseToFine()(splits(distance=8.0)))
    assert spread["coarse_to_fine/fine/accuracy"] == 1.0
    assert spread["coarse_to_fine/fine_within_coarse/accuracy"] == 1.0


def test_chance_levels_by_hand():
    fine_train = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    fine_test = torch.tensor([0, 1, 1, 2, 3, 3])
    generator = torch.Generator().manual_seed(0)

    def split(fine: torch.Tensor) -> FeatureSet:
        return FeatureSet(torch.randn(len(fine), 3, generator=generator), fine // 2, fine)

    found = numbers(CoarseToFine()(FeatureSplits(split(fine_train), split(fine_train), split(fine_test))))
    assert found["coarse_to_fine/fine/chance"] == pytest.approx(2 / 6)  # says 3
    assert found["coarse_to_fine/coarse/chance"] == pytest.approx(3 / 6)  # says 1
    assert found["coarse_to_fine/fine_within_coarse/chance"] == pytest.approx(3 / 6)  # says 0 or 3


def test_knowing_the_coarse_class_never_hurts_and_one_level_is_fitted_once(monkeypatch):
    data = splits(distance=0.5)
    results = dict(CoarseToFine()(data))
    plain, told = (results[f"coarse_to_fine/{name}/correct"] for name in ("fine", "fine_within_coarse"))
    assert bool((told | ~plain).all())
    assert told.sum() > plain.sum()

    from pysupcon.evaluators import coarse_to_fine

    fitted = []
    fit = coarse_to_fine.fit_probe
    monkeypatch.setattr(coarse_to_fine, "fit_probe", lambda *a, **k: fitted.append(a[2]) or fit(*a, **k))
    one_level = FeatureSplits(*(FeatureSet(s.features, s.fine, s.fine) for _, s in data.items()))
    same = numbers(CoarseToFine()(one_level))
    assert same["coarse_to_fine/fine/accuracy"] == results["coarse_to_fine/fine/accuracy"]
    assert not [name for name in same if "coarse/" in name.removeprefix("coarse_to_fine/")]
    assert fitted == ["fine"]
