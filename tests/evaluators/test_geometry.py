"""Geometry and separation against loops and points known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.feature_cases import blobs, numbers, splits
from hypothesis import given, settings
from hypothesis import strategies as st

from pysupcon.evaluators import FeatureSet, FeatureSplits, Geometry, GeometryConfig, Separation
from pysupcon.evaluators.geometry import effective_rank
from pysupcon.evaluators.metrics import roc_auc
from pysupcon.evaluators.separation import target_and_noise


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
