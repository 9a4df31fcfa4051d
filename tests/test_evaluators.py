"""Evaluators against independent truths: dense loops, scikit-learn, points of known geometry."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysupcon import evaluators
from pysupcon.evaluators import (
    KNN,
    BootstrapConfig,
    CoarseToFine,
    CoarseToFineConfig,
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    Geometry,
    GeometryConfig,
    KNNConfig,
    LinearProbe,
    LinearProbeConfig,
    ProbeConfig,
    ProjectionConfig,
    Separation,
    build_evaluators,
    project,
    unit_of,
    with_intervals,
)
from pysupcon.evaluators.bootstrap import percentile_interval, resampled_means
from pysupcon.evaluators.geometry import effective_rank
from pysupcon.evaluators.knn import nearest_neighbours, vote
from pysupcon.evaluators.linear_probe import _optimizer, fit_probe
from pysupcon.evaluators.separation import roc_auc, target_and_noise

FINE_OF_COARSE = 3  # fine classes 0..5, coarse class = fine // 3


def blobs(
    n: int, *, width: int = 8, distance: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> FeatureSet:
    """Gaussian blobs of deviation 1 round six centres, of which three make a coarse class."""
    centres = torch.randn(6, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(n) % 6
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return FeatureSet((distance * centres[fine] + noise).to(dtype), fine // FINE_OF_COARSE, fine)


def splits(distance: float = 2.0, train: int = 120, dtype: torch.dtype = torch.float64) -> FeatureSplits:
    return FeatureSplits(*(blobs(n, distance=distance, seed=n, dtype=dtype) for n in (train, 61, 90)))


def numbers(results) -> dict[str, float]:
    return {name: value for name, value in results if isinstance(value, float)}


# k-NN


def dense_knn(train: FeatureSet, test: FeatureSet, labels: torch.Tensor, k: int, temperature: float):
    """The definition, one test sample at a time, in fp64."""
    bank, rows = train.features.double().numpy(), test.features.double().numpy()
    predicted = []
    for row in rows:
        cosines = bank @ row / np.linalg.norm(bank, axis=1) / np.linalg.norm(row)
        votes: dict[int, float] = {}
        for j in np.argsort(-cosines)[:k]:
            votes[int(labels[j])] = votes.get(int(labels[j]), 0.0) + math.exp(cosines[j] / temperature)
        predicted.append(max(sorted(votes), key=votes.__getitem__))
    return torch.tensor(predicted)


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 26])  # a row at a time, ragged blocks, one block
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_knn_equals_the_dense_definition(chunk_bytes, temperature):
    data = splits(distance=0.7)
    config = KNNConfig(k=[1, 5, 20, 200], temperature=temperature, chunk_bytes=chunk_bytes)
    results = dict(KNN(config)(data))
    for level in ("fine", "coarse"):
        for k in config.k:
            predicted = dense_knn(data.train, data.test, data.train.labels(level), k, temperature)
            truth = predicted == data.test.labels(level)
            assert torch.equal(results[f"knn/k={k}/{level}/correct"], truth)
            assert results[f"knn/k={k}/{level}/accuracy"] == truth.double().mean()


@pytest.mark.parametrize("k", [1, 5, 17])
def test_knn_equals_scikit_learn(k):
    from sklearn.neighbors import KNeighborsClassifier

    data = splits(distance=0.7)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(data.train.features.numpy(), data.train.fine.numpy())
    expected = reference.score(data.test.features.numpy(), data.test.fine.numpy())
    assert numbers(KNN(KNNConfig(k=[k]))(data))[f"knn/k={k}/fine/accuracy"] == pytest.approx(
        expected, abs=1e-12
    )


def test_knn_beyond_the_training_set_takes_all_of_it():
    data = splits(distance=0.7, train=24)
    found = numbers(KNN(KNNConfig(k=[24, 25, 10_000]))(data))
    for level in ("fine", "coarse"):
        assert len({found[f"knn/k={k}/{level}/accuracy"] for k in (24, 25, 10_000)}) == 1


def test_near_neighbours_outvote_many_distant_ones_by_temperature():
    cosines, classes = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]])
    assert vote(cosines, classes, 2, temperature=0.07).item() == 1
    assert vote(cosines, classes, 2, temperature=100.0).item() == 0
    assert vote(cosines, classes, 2, temperature=1e-6).item() == 1  # exp(0.9 / 1e-6) would overflow


def test_neighbours_are_sorted_and_exact_for_ragged_chunks():
    bank, queries = blobs(97, seed=1).features, blobs(31, seed=2).features
    cosines, indices = nearest_neighbours(queries, bank, 10, chunk_bytes=3 * 97 * 8)
    dense = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    expected = dense.sort(dim=1, descending=True)
    torch.testing.assert_close(cosines, expected.values[:, :10])
    assert torch.equal(indices, expected.indices[:, :10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_judged_in_fp32(dtype):
    data = splits(distance=3.0, dtype=dtype)
    widened = FeatureSplits(
        *(FeatureSet(split.features.float(), split.coarse, split.fine) for _, split in data.items())
    )
    config = EvaluationConfig(progress=False)
    for low, wide in zip(build_evaluators(config), build_evaluators(config), strict=True):
        assert numbers(low(data)) == numbers(wide(widened))


# Linear probe


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
        probe.scores(data.test.features).softmax(dim=1), torch.from_numpy(expected), rtol=0, atol=2e-3
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
        optimizer, scheduler = _optimizer(head, 0.5, config, steps)
        seen = []
        for _ in range(config.epochs * steps):
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
    assert same["coarse_to_fine/coarse/accuracy"] == same["coarse_to_fine/fine/accuracy"]
    assert same["coarse_to_fine/fine_within_coarse/accuracy"] == 1.0
    assert fitted == ["fine"]


# Geometry


def geometry(features, coarse, fine, **arguments) -> dict[str, float]:
    one = FeatureSet(torch.as_tensor(features, dtype=torch.float64), torch.tensor(coarse), torch.tensor(fine))
    found = numbers(Geometry(GeometryConfig(**arguments))(FeatureSplits(one, one, one)))
    return {name.removeprefix("geometry/"): value for name, value in found.items()}


def test_geometry_of_four_points_on_a_circle():
    # Lengths other than 1 must not matter.
    found = geometry([[2.0, 0.0], [0.0, 3.0], [-0.5, 0.0], [0.0, -1.0]], [0, 0, 1, 1], [0, 1, 2, 3])
    assert found == pytest.approx(
        {
            "spread/coarse": math.sqrt(0.5),
            "spread/fine": 0.0,
            "between/coarse": math.sqrt(2),
            "between/fine_within_coarse": math.sqrt(2),
            "separation/fine_within_coarse": 0.0,  # over a spread of nothing
            "variance/total": 1.0,
            "variance/within_coarse": 0.5,
            "variance/explained_by_fine": 1.0,
            "effective_rank/total": 2.0,
            "effective_rank/within_coarse": 1.0,
            "collapse/class": 0.0,
            "collapse/complete": 0.0,
        },
        abs=1e-9,
    )


def test_geometry_against_loops():
    data = blobs(60, distance=1.0, seed=5)
    found = geometry(data.features.tolist(), data.coarse.tolist(), data.fine.tolist())
    rows = data.features.numpy() / np.linalg.norm(data.features.numpy(), axis=1, keepdims=True)
    fine, coarse = data.fine.numpy(), data.coarse.numpy()
    means = {f: rows[fine == f].mean(axis=0) for f in range(6)}
    parents = {c: rows[coarse == c].mean(axis=0) for c in range(2)}
    within = np.mean([np.linalg.norm(rows[i] - means[fine[i]]) for i in range(60)])
    between = np.mean(
        [np.linalg.norm(means[a] - means[b]) for a in range(6) for b in range(a) if a // 3 == b // 3]
    )
    assert found["spread/fine"] == pytest.approx(within)
    assert found["between/fine_within_coarse"] == pytest.approx(between)
    assert found["separation/fine_within_coarse"] == pytest.approx(between / within)
    assert found["between/coarse"] == pytest.approx(np.linalg.norm(parents[0] - parents[1]))
    assert found["spread/coarse"] == pytest.approx(
        np.mean([np.linalg.norm(rows[i] - parents[coarse[i]]) for i in range(60)])
    )
    total = np.mean([np.linalg.norm(row - rows.mean(axis=0)) ** 2 for row in rows])
    in_coarse = np.mean([np.linalg.norm(rows[i] - parents[coarse[i]]) ** 2 for i in range(60)])
    in_fine = np.mean([np.linalg.norm(rows[i] - means[fine[i]]) ** 2 for i in range(60)])
    assert found["variance/total"] == pytest.approx(total)
    assert found["variance/within_coarse"] == pytest.approx(in_coarse / total)
    assert found["variance/explained_by_fine"] == pytest.approx(1 - in_fine / in_coarse)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 40), width=st.integers(1, 6), classes=st.integers(1, 5), seed=st.integers(0, 2**31 - 1)
)
def test_geometry_ignores_order_lengths_rotations_and_names(n, width, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.1
    fine = torch.randint(classes, (n,), generator=generator)
    coarse = fine // 2
    order = torch.randperm(n, generator=generator)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    lengths = torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.5
    before = geometry(rows.tolist(), coarse.tolist(), fine.tolist())
    after = geometry(
        ((rows * lengths) @ rotation)[order].tolist(),
        (9 - coarse[order]).tolist(),
        (50 - 3 * fine[order]).tolist(),
    )
    assert after == pytest.approx(before, rel=1e-7, abs=1e-7)


def test_permuting_subclasses_within_a_class_leaves_the_class_but_not_what_the_subclasses_explain():
    data = blobs(600, distance=3.0, seed=1)
    generator = torch.Generator().manual_seed(0)
    shuffled = data.fine.clone()
    for c in (0, 1):
        members = (data.coarse == c).nonzero().flatten()
        shuffled[members] = data.fine[members[torch.randperm(len(members), generator=generator)]]
    rows, coarse = data.features.tolist(), data.coarse.tolist()
    before = geometry(rows, coarse, data.fine.tolist())
    after = geometry(rows, coarse, shuffled.tolist())
    for name in ("spread/coarse", "between/coarse", "variance/within_coarse", "effective_rank/within_coarse"):
        assert after[name] == before[name]
    assert before["variance/explained_by_fine"] > 0.5
    assert after["variance/explained_by_fine"] < 0.05


def test_collapse_alarms():
    coarse, fine = [0, 0, 1, 1], [0, 1, 2, 3]
    point = geometry([[1.0, 1.0]] * 4, coarse, fine)
    assert (point["collapse/class"], point["collapse/complete"]) == (1.0, 1.0)
    assert point["effective_rank/total"] == 0.0
    classes = geometry([[1.0, 0.0], [1.0, 1e-3], [0.0, 1.0], [1e-3, 1.0]], coarse, fine)
    assert (classes["collapse/class"], classes["collapse/complete"]) == (1.0, 0.0)
    wary = geometry(
        [[1.0, 0.0], [1.0, 1e-3], [0.0, 1.0], [1e-3, 1.0]], coarse, fine, class_collapse_below=1e-9
    )
    assert wary["collapse/class"] == 0.0


def test_geometry_judges_the_split_it_is_told():
    near, far = blobs(30, distance=0.0), blobs(30, distance=9.0)
    data = FeatureSplits(near, near, far)
    by_split = {
        split: numbers(Geometry(GeometryConfig(split=split))(data)) for split in ("train", "val", "test")
    }
    assert by_split["train"] == by_split["val"]
    assert by_split["train"]["geometry/spread/fine"] > 2 * by_split["test"]["geometry/spread/fine"]


def test_effective_rank_of_known_singular_values():
    def turned(values: list[float]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        left = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
        return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right

    assert effective_rank(turned([2, 2, 2, 0])) == pytest.approx(3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(turned([3, 1, 0, 0])) == pytest.approx(math.exp(entropy))


# Separation


def test_separation_equals_loops_and_scikit_learn():
    from sklearn.metrics import roc_auc_score

    data = splits(distance=0.7)
    train, test = data.train, data.test
    cosines = torch.nn.functional.cosine_similarity(test.features[:, None], train.features[None], dim=2)
    found = numbers(Separation()(data))
    for level in ("fine", "coarse"):
        labels, truth = train.labels(level).tolist(), test.labels(level).tolist()
        pairs = [
            (
                max(c for c, label in zip(row, labels, strict=True) if label == own),
                max(c for c, label in zip(row, labels, strict=True) if label != own),
            )
            for row, own in zip(cosines.tolist(), truth, strict=True)
        ]
        target, noise = np.array(pairs).T
        assert found[f"separation/{level}/target_median"] == pytest.approx(np.median(target))
        assert found[f"separation/{level}/noise_median"] == pytest.approx(np.median(noise))
        assert found[f"separation/{level}/margin"] == pytest.approx(abs(np.median(target) - np.median(noise)))
        auc = roc_auc_score([1] * len(target) + [0] * len(noise), [*target, *noise])
        assert found[f"separation/{level}/roc_auc"] == pytest.approx(auc)


def test_roc_auc_counts_ties_half():
    assert roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(3.5 / 4)


def test_separation_leaves_out_samples_without_a_target():
    data = splits()
    keep = data.train.fine != 2
    train = FeatureSet(data.train.features[keep], data.train.coarse[keep], data.train.fine[keep])
    target, noise = target_and_noise(train, data.test, "fine", chunk_bytes=1000)
    assert torch.equal(target.isinf(), data.test.fine == 2)
    assert bool(noise.isfinite().all())
    found = numbers(Separation()(FeatureSplits(train, data.val, data.test)))
    assert found["separation/fine/target_median"] == pytest.approx(
        target[data.test.fine != 2].median().item(), abs=0.1
    )
    one = FeatureSet(train.features, torch.zeros_like(train.coarse), train.fine)
    assert not [name for name, _ in Separation()(FeatureSplits(one, one, one)) if "/coarse/" in name]


# Bootstrap


def test_bootstrap_interval_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        outcomes = torch.rand(150, generator=generator) < 0.7
        means = resampled_means(outcomes, BootstrapConfig(resamples=200, seed=seed))
        low, high = percentile_interval(means, 0.9)
        covered += low <= 0.7 <= high
    assert 0.84 <= covered / 200 <= 0.96


def test_bootstrap_deviation_is_the_standard_error():
    outcomes = torch.arange(400) < 300
    means = resampled_means(outcomes, BootstrapConfig(resamples=2000))
    assert means.mean() == pytest.approx(0.75, abs=0.002)
    assert means.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.06)


def test_bootstrap_is_seeded_paired_and_leaves_certainty_alone():
    a, b = torch.arange(50) < 40, torch.arange(50) % 3 == 0
    config = BootstrapConfig(resamples=100, seed=3)
    assert torch.equal(resampled_means(a, config), resampled_means(a, config))
    assert not torch.equal(resampled_means(a, config), resampled_means(a, BootstrapConfig(100, seed=4)))
    difference = resampled_means(a.double() - b.double(), config)
    torch.testing.assert_close(resampled_means(a, config) - resampled_means(b, config), difference)
    assert percentile_interval(resampled_means(torch.ones(9, dtype=torch.bool), config), 0.95) == (1.0, 1.0)


def test_every_accuracy_gets_an_interval_that_holds_it():
    data = splits(distance=0.7)
    config = EvaluationConfig(evaluators=["coarse_to_fine", "linear_probe", "knn"])
    wide, narrow = BootstrapConfig(confidence=0.95), BootstrapConfig(confidence=0.5)
    for evaluator in build_evaluators(config):
        found, inner = (numbers(with_intervals(evaluator(data), level)) for level in (wide, narrow))
        accuracies = [name for name in found if name.endswith("/accuracy")]
        assert accuracies
        for name in accuracies:
            assert found[f"{name}/low"] <= inner[f"{name}/low"] <= found[name]
            assert found[name] <= inner[f"{name}/high"] <= found[f"{name}/high"]
            assert found[f"{name}/low"] < found[f"{name}/high"]


# Projection


def test_pca_equals_scikit_learn_up_to_sign():
    from sklearn.decomposition import PCA

    features = blobs(50).features
    points, rows = project(features, ProjectionConfig(method="pca"))
    expected = PCA(2).fit_transform(torch.nn.functional.normalize(features, dim=1).numpy())
    torch.testing.assert_close(points.abs().double(), torch.from_numpy(expected).abs(), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows, torch.arange(50))
    flat, _ = project(features[:, :1], ProjectionConfig(method="pca"))
    assert flat.shape == (50, 2)
    assert bool((flat[:, 1] == 0).all())


@pytest.mark.parametrize("n", [2, 4, 40])  # below what t-SNE can do, its least, usual
def test_tsne_is_seeded_and_keeps_neighbours(n):
    data = blobs(n, distance=8.0)
    first, _ = project(data.features, ProjectionConfig())
    again, _ = project(data.features, ProjectionConfig())
    assert torch.equal(first, again)
    assert first.shape == (n, 2)
    assert bool(first.isfinite().all())
    if n == 40:
        nearest = (torch.cdist(first, first) + 1e9 * torch.eye(n)).argmin(dim=1)
        assert (data.fine[nearest] == data.fine).double().mean() > 0.9


def test_projection_samples_a_large_split():
    features = blobs(80).features
    points, rows = project(features, ProjectionConfig(method="pca", max_points=30, seed=1))
    assert points.shape == (30, 2)
    assert torch.equal(rows, rows.unique())
    assert not torch.equal(rows, project(features, ProjectionConfig("pca", 30, seed=2))[1])


# All of them


def test_evaluators_are_deterministic_quiet_and_leave_the_random_state(capfd):
    data = splits(distance=0.7, dtype=torch.float32)
    for solver in ("logistic", "sgd"):
        arguments = {"solver": solver, "epochs": 5, "max_iterations": 2}
        config = EvaluationConfig(
            evaluators=evaluators.available(),
            coarse_to_fine=CoarseToFineConfig(**arguments),
            linear_probe=LinearProbeConfig(**arguments),
        )
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        first = [numbers(evaluator(data)) for evaluator in build_evaluators(config)]
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(1)
        assert [numbers(evaluator(data)) for evaluator in build_evaluators(config)] == first
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_every_result_is_finite_named_after_its_evaluator_and_has_a_unit():
    config = EvaluationConfig(evaluators=evaluators.available())
    assert [type(e).name for e in build_evaluators(config)] == evaluators.available()
    for evaluator in build_evaluators(config):
        results = list(evaluator(splits()))
        assert len({name for name, _ in results}) == len(results)
        for name, value in results:
            assert name.startswith(f"{evaluator.name}/")
            if isinstance(value, torch.Tensor):
                assert name.endswith("/correct")
                assert value.dtype == torch.bool
                assert value.shape == (90,)
            else:
                assert math.isfinite(value)
                assert unit_of(name)
    assert unit_of("nobody/accuracy") == unit_of("knn/k=1/fine/nothing") == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_judged_as_on_the_cpu():
    data = splits(distance=0.7)
    moved = FeatureSplits(
        *(FeatureSet(*(t.cuda() for t in (s.features, s.coarse, s.fine))) for _, s in data.items())
    )
    config = EvaluationConfig(evaluators=evaluators.available())
    for here, there in zip(build_evaluators(config), build_evaluators(config), strict=True):
        assert numbers(there(moved)) == pytest.approx(numbers(here(data)), rel=1e-6, abs=1e-6)


def features(rows: int = 3, **changed) -> dict:
    labels = torch.zeros(rows, dtype=torch.int64)
    return {"features": torch.ones(rows, 2), "coarse": labels, "fine": labels} | changed


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: FeatureSet(**features(features=torch.ones(3))),
            r"features must be floating point of shape \[N, D\].* got torch.float32 of shape \[3\]",
        ),
        (
            lambda: FeatureSet(**features(features=torch.ones(3, 2, dtype=torch.int64))),
            r"features must be floating point .* got torch.int64 of shape \[3, 2\]",
        ),
        (lambda: FeatureSet(**features(0)), r"N >= 1 and D >= 1, got torch.float32 of shape \[0, 2\]"),
        (
            lambda: FeatureSet(**features(fine=torch.zeros(2, dtype=torch.int64))),
            r"fine must be int64 of shape \[N\]=\[3\] .* got torch.int64 of shape \[2\]",
        ),
        (
            lambda: FeatureSet(**features(coarse=torch.zeros(3))),
            r"coarse must be int64 of shape \[N\]=\[3\] .* got torch.float32 of shape \[3\]",
        ),
        (
            lambda: FeatureSet(**features(features=torch.tensor([[1, 2], [math.nan, 0], [math.inf, 1]]))),
            "features must be finite, got NaN or infinity in 2 of 3 rows, the first of them row 1",
        ),
        (
            lambda: FeatureSet(**features(fine=torch.zeros(3, dtype=torch.int64, device="meta"))),
            "fine must be on the features' device cpu, got meta",
        ),
        (
            lambda: FeatureSplits(
                *(FeatureSet(**features(features=torch.ones(3, width))) for width in (2, 2, 5))
            ),
            r"same width D, got \{'train': 2, 'val': 2, 'test': 5\}",
        ),
        (lambda: FeatureSet(**features()).labels("medium"), "level must be .* got 'medium'"),
        (lambda: KNNConfig(k=[]), r"knn.k must be one or more positive numbers of neighbours, got \[\]"),
        (lambda: KNNConfig(k=[5, 0]), r"knn.k must be .* got \[5, 0\]"),
        (lambda: KNNConfig(temperature=0.0), "knn.temperature must be > 0, got 0.0"),
        (lambda: ProbeConfig(solver="newton"), "solver must be .* got 'newton'"),
        (lambda: ProbeConfig(penalties=[0.0]), r"penalties must be .* got \[0.0\]"),
        (lambda: ProbeConfig(learning_rates=[-1.0]), r"learning_rates must be positive, got \[-1.0\]"),
        (lambda: ProbeConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: LinearProbeConfig(level="medium"), "level must be .* got 'medium'"),
        (lambda: GeometryConfig(split="dev"), "geometry.split must be .* got 'dev'"),
        (
            lambda: GeometryConfig(class_collapse_below=2.0),
            r"class_collapse_below must be in \[0, 1\], got 2.0",
        ),
        (lambda: BootstrapConfig(resamples=0), "bootstrap.resamples must be at least 1, got 0"),
        (lambda: BootstrapConfig(confidence=1.0), r"bootstrap.confidence must be in \(0, 1\), got 1.0"),
        (lambda: ProjectionConfig(method="umap"), "projection.method must be .* got 'umap'"),
        (
            lambda: EvaluationConfig(evaluators=["knn", "nobody"]),
            r"evaluators must be among .* got \['nobody'\]",
        ),
        (lambda: EvaluationConfig(evaluators=["knn", "knn"]), "each once, got"),
        (lambda: EvaluationConfig(batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument_the_contract_and_what_came(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_evaluators_know_neither_trainer_nor_losses():
    allowed = {"torch", "sklearn", "tqdm", "threadpoolctl", *sys.stdlib_module_names}
    for path in Path(evaluators.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.module or "").partition(".")[0] in allowed, path


def test_importing_the_evaluators_imports_no_heavy_library():
    code = (
        "import sys, pysupcon.evaluators as e; e.EvaluationConfig();"
        "print([m for m in ('sklearn', 'matplotlib', 'scipy', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
