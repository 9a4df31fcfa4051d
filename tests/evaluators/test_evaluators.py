"""k-NN, bootstrap and projection against independent truths, and what all evaluators have in common."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.feature_cases import blobs, numbers, splits

from pysupcon import evaluators
from pysupcon.evaluators import (
    KNN,
    BootstrapConfig,
    CoarseToFineConfig,
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    GeometryConfig,
    KNNConfig,
    LinearProbeConfig,
    ProbeConfig,
    ProjectionConfig,
    build_evaluators,
    describe,
    headline_of,
    project,
    unit_of,
    usable_k,
    with_intervals,
)
from pysupcon.evaluators.bootstrap import bootstrap_means, percentile_interval
from pysupcon.evaluators.knn import nearest_neighbours, weighted_vote

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
    config = KNNConfig(k=[1, 5, 20, len(data.train) // 2], temperature=temperature, chunk_bytes=chunk_bytes)
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


def test_knn_leaves_out_numbers_above_half_of_the_training_set():
    data = splits(distance=0.7, train=24)
    found = numbers(KNN(KNNConfig(k=[200, 13, 12, 1, 12]))(data))
    assert list(found) == [f"knn/k={k}/{level}/accuracy" for level in ("fine", "coarse") for k in (1, 12)]
    assert usable_k([200, 13, 12, 1, 12], 24) == [1, 12]
    assert not numbers(KNN(KNNConfig(k=[13]))(data))


def test_labels_of_one_level_are_evaluated_once():
    two = splits(distance=0.7)
    # The same classes under two numberings are one level, too.
    one = FeatureSplits(*(FeatureSet(s.features, 7 - s.fine, s.fine) for _, s in two.items()))
    assert (two.levels, one.levels) == (("fine", "coarse"), ("fine",))
    config = EvaluationConfig(progress=False)
    for evaluator in build_evaluators(config):
        once, twice = numbers(evaluator(one)), numbers(evaluator(two))
        left_out = {name for name in twice if name not in once}
        assert left_out
        for name, value in once.items():
            if "/fine/" in name:
                assert value == twice[name], name
        gone = "fine" if evaluator.name == "geometry" else "coarse"
        assert all(gone in name for name in left_out)


def test_the_headline_of_every_evaluator_is_among_its_results():
    data = splits(distance=0.7)
    config = EvaluationConfig(evaluators=[*EvaluationConfig().evaluators, "worst_group"], progress=False)
    for evaluator in build_evaluators(config):
        names = list(numbers(evaluator(data)))
        chosen = headline_of(names, [evaluator])
        patterns = [f"{evaluator.name}/{pattern}" for pattern in evaluator.headline]
        assert all(any(fnmatchcase(name, pattern) for name in chosen) for pattern in patterns)
        assert len(chosen) <= 8
        assert all(describe(name)[1] for name in names), [name for name in names if not describe(name)[1]]
    assert headline_of(["knn/k=3/fine/accuracy", "knn/k=5/fine/accuracy"], [KNN()]) == [
        "knn/k=3/fine/accuracy"
    ]


def test_near_neighbours_outvote_many_distant_ones_by_temperature():
    cosines, classes = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]])
    assert weighted_vote(cosines, classes, 2, temperature=0.07).item() == 1
    assert weighted_vote(cosines, classes, 2, temperature=100.0).item() == 0
    close = torch.tensor([[0.9, 0.8, 0.5]])
    assert weighted_vote(close, classes, 2, temperature=1e-6).item() == 1  # exp(0.9 / 1e-6) would overflow


def test_votes_are_cosines_on_request():
    """Sums of cosines; a class without a neighbour never wins, not even against negative cosines."""
    cosines, classes = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]])
    assert weighted_vote(cosines, classes, 3, temperature=None).item() == 0
    assert weighted_vote(cosines, classes, 3, temperature=0.07).item() == 1
    negative = torch.tensor([[-0.2, -0.3, -0.4]])
    assert weighted_vote(negative, torch.tensor([[2, 1, 1]]), 3, temperature=None).item() == 2
    data = splits(distance=0.5)
    found = {votes: dict(KNN(KNNConfig(k=[9], votes=votes))(data)) for votes in ("exp", "cosine")}
    predicted = [found[votes]["knn/k=9/fine/predicted"] for votes in ("exp", "cosine")]
    similar = torch.nn.functional.normalize(data.test.features, dim=1)
    similar = similar @ torch.nn.functional.normalize(data.train.features, dim=1).T
    best = similar.topk(9, dim=1)
    members = torch.nn.functional.one_hot(data.train.fine[best.indices], 6).double()
    sums = (best.values[:, :, None] * members).sum(dim=1)
    assert torch.equal(predicted[1], sums.masked_fill(members.sum(dim=1) == 0, -9).argmax(dim=1))
    assert not torch.equal(*predicted)


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


# Bootstrap


def test_bootstrap_interval_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        outcomes = torch.rand(150, generator=generator) < 0.7
        means = bootstrap_means(outcomes, BootstrapConfig(resamples=200, seed=seed))
        low, high = percentile_interval(means, 0.9)
        covered += low <= 0.7 <= high
    assert 0.84 <= covered / 200 <= 0.96


def test_bootstrap_deviation_is_the_standard_error():
    outcomes = torch.arange(400) < 300
    means = bootstrap_means(outcomes, BootstrapConfig(resamples=2000))
    assert means.mean() == pytest.approx(0.75, abs=0.002)
    assert percentile_interval(torch.linspace(0, 1, 101), 0.9) == pytest.approx((0.05, 0.95))
    assert means.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.06)


def test_bootstrap_is_seeded_paired_and_leaves_certainty_alone():
    a, b = torch.arange(50) < 40, torch.arange(50) % 3 == 0
    config = BootstrapConfig(resamples=100, seed=3)
    assert torch.equal(bootstrap_means(a, config), bootstrap_means(a, config))
    assert not torch.equal(bootstrap_means(a, config), bootstrap_means(a, BootstrapConfig(100, seed=4)))
    difference = bootstrap_means(a.double() - b.double(), config)
    torch.testing.assert_close(bootstrap_means(a, config) - bootstrap_means(b, config), difference)
    assert percentile_interval(bootstrap_means(torch.ones(9, dtype=torch.bool), config), 0.95) == (1.0, 1.0)


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
            evaluators=evaluators.available_evaluators(),
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
    config = EvaluationConfig(evaluators=evaluators.available_evaluators())
    assert [type(e).name for e in build_evaluators(config)] == evaluators.available_evaluators()
    for evaluator in build_evaluators(config):
        results = list(evaluator(splits()))
        assert len({name for name, _ in results}) == len(results)
        for name, value in results:
            assert name.startswith(f"{evaluator.name}/")
            if isinstance(value, torch.Tensor):
                assert value.shape == (90,)
                assert value.device.type == "cpu"
                assert (value.dtype == torch.bool) == name.endswith("/correct")
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
    config = EvaluationConfig(evaluators=evaluators.available_evaluators())
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
    allowed = {"torch", "sklearn", "scipy", "tqdm", "threadpoolctl", *sys.stdlib_module_names}
    for path in Path(evaluators.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                rooms = ("evaluators", "errors", "reading", "user_code")
                own = module.startswith(tuple(f"pysupcon.{room}" for room in rooms))
                assert own or module.partition(".")[0] in allowed, f"{path} imports {module}"


def test_importing_the_evaluators_imports_no_heavy_library():
    code = (
        "import sys, pysupcon.evaluators as e; e.EvaluationConfig();"
        "print([m for m in ('sklearn', 'matplotlib', 'scipy', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
