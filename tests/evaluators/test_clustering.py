"""The protocol of Sohoni et al. for the clusters of a class: score, reduction, and parts of clusters."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from pysupcon.evaluators import (
    FeatureSet,
    FeatureSplits,
    LinearHead,
    SubgroupConfig,
    WorstGroup,
    WorstGroupConfig,
    infer_groups,
    recovery,
)

PLAIN = {"reduce": "none", "cluster": "kmeans", "normalize": False}


def blobs(*parts: tuple[int, float, float], spread: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Points of a plane, ``count`` around each centre (x, y)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.tensor([x, y]) + spread * torch.randn(count, 2, generator=generator) for count, x, y in parts
    ]
    return torch.cat(rows)


def one_class(rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(rows), dtype=torch.int64)


@pytest.mark.parametrize("score", ["clusters", "samples"])
def test_the_score_chooses_the_number_of_clusters(score):
    """By the mean over the clusters, the small group at (2.2, 0) counts; by the mean over the samples not."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_samples

    rows = torch.cat(
        [blobs((200, 0, 0), (200, 6, 0), spread=0.9), blobs((8, 2.4, 0), spread=0.05, seed=1)]
    ).double()
    found = infer_groups(rows, one_class(rows), SubgroupConfig(**PLAIN, k_max=6, score=score))
    scores = {}
    for k in range(2, 7):
        labels = KMeans(k, n_init=3, random_state=0).fit_predict(rows.numpy())
        values = silhouette_samples(rows.numpy(), labels)
        by_cluster = [values[labels == label].mean() for label in range(k)]
        scores[k] = np.mean(by_cluster) if score == "clusters" else values.mean()
    assert len(found) == max(scores, key=scores.__getitem__)
    assert found.silhouettes[0] == pytest.approx(max(scores.values()))


def test_a_small_cluster_counts_as_much_as_a_large_one():
    """Two clusters, one of them small and loose: its low silhouette halves the score of the clusters."""
    rows = torch.cat([blobs((300, 0, 0), spread=0.1), blobs((6, 3, 0), spread=1.0, seed=2)])
    values = {}
    for score in ("clusters", "samples"):
        config = SubgroupConfig(**PLAIN, k_max=2, score=score)
        values[score] = infer_groups(rows, one_class(rows), config).silhouettes[0]
    assert values["samples"] > 0.9 > values["clusters"] > 0


# Two clusters; the second holds a separate group of 40 at its side, which k = 2 does not separate.
LARGE, BESIDE, SMALL = (200, 0.0, 0.0), (200, 6.0, 0.0), (40, 9.5, 0.0)
ROWS = blobs(LARGE, BESIDE, SMALL, spread=0.2)
TRUTH = torch.arange(3).repeat_interleave(torch.tensor([LARGE[0], BESIDE[0], SMALL[0]]))
HARD = (TRUTH == 2).double()


def split(losses: torch.Tensor | None = None, validation=None, **changed):
    config = SubgroupConfig(**(PLAIN | {"k_max": 2, "overcluster": 2} | changed))
    return infer_groups(ROWS, one_class(ROWS), config, losses=losses, validation=validation)


def test_a_part_of_high_loss_becomes_a_group():
    assert len(split(overcluster=1)) == 2
    found = split(HARD)
    # The part of lower loss is the rest of its cluster; the large cluster has no parts of its own.
    assert len(found) == 3
    assert recovery(found.groups, TRUTH) == (1.0, 1.0)
    assert torch.equal(found.predict(ROWS, one_class(ROWS)), found.groups)
    new = blobs((5, 9.5, 0.0), spread=0.2, seed=3)
    assert set(found.predict(new, one_class(new)).tolist()) == {int(found.groups[-1])}


def test_parts_need_loss_silhouette_and_samples():
    assert len(split(1 - HARD)) == 3, "the large part has the higher loss: it becomes the group"
    assert len(split()) == 3, "without losses every clear part is kept"
    assert len(split(HARD, min_part=41)) == 2
    assert len(split(HARD, min_part=40)) == 3
    assert len(split(HARD, min_part_share=0.1)) == 2  # 40 of 440 samples
    assert len(split(HARD, min_part_share=0.09)) == 3
    # A cluster that is one blob gains no silhouette from a split.
    blob = blobs((200, 0.0, 0.0), (200, 20.0, 0.0))
    config = SubgroupConfig(**PLAIN, k_max=2, overcluster=5)
    assert len(infer_groups(blob, one_class(blob), config)) == 2


@pytest.mark.parametrize(("count", "least", "groups"), [(24, 25, 2), (25, 25, 3), (0, 25, 2), (0, 0, 3)])
def test_parts_need_validation_samples(count, least, groups):
    val = blobs((60, 0.0, 0.0), (60, 6.0, 0.0), (count, 9.5, 0.0), spread=0.2, seed=4)
    assert len(split(HARD, (val, one_class(val)), min_val_part=least)) == groups


def test_parts_are_numbered_over_classes_and_all_groups_have_samples():
    rows = torch.cat([ROWS, ROWS + 3])
    labels = torch.arange(2).repeat_interleave(len(ROWS))
    config = SubgroupConfig(cluster="gmm", reduce="pca", normalize=False, k_max=3, overcluster=5, min_part=5)
    found = infer_groups(rows, labels, config)
    assert torch.equal(found.groups.unique(), torch.arange(len(found)))
    assert torch.equal(found.parent[found.groups], labels)
    assert torch.equal(found.predict(rows, labels), found.groups)


def test_a_cluster_without_a_training_sample_is_no_group(monkeypatch):
    """A mixture can have a component that is no sample's likeliest one."""
    from sklearn.cluster import KMeans

    monkeypatch.setattr(KMeans, "predict", lambda self, points: np.where(np.asarray(points)[:, 0] < 3, 0, 2))
    far = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    found = infer_groups(ROWS, one_class(ROWS), SubgroupConfig(**PLAIN, k_min=3, k_max=3))
    assert found.groups.unique().tolist() == [0, 1]
    assert len(found) == 2
    assert found.predict(far, one_class(far)).tolist() == [0, 1]
    monkeypatch.setattr(KMeans, "predict", lambda self, points: np.ones(len(points), dtype=np.int32))
    assert found.predict(far, one_class(far)).tolist() == [-1, -1]


def test_whole_classes_are_one_group():
    rows, labels = torch.cat([ROWS, ROWS]), torch.tensor([4, 7]).repeat_interleave(len(ROWS))
    found = infer_groups(rows, labels, SubgroupConfig(**PLAIN, k_max=2, whole_classes=[7]))
    assert found.parent.tolist() == [4, 4, 7]
    assert found.predict(ROWS[:2], torch.tensor([7, 7])).tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"whole_classes must hold labels .*\[4, 7\], got \[5\]"):
        infer_groups(rows, labels, SubgroupConfig(whole_classes=[5, 7]))


def test_the_evaluator_gives_the_losses_of_the_trained_head():
    """A head that is wrong on the small group makes it a group, one that is right does not."""

    def groups_with(weight: float) -> float:
        features = torch.cat([ROWS, ROWS + torch.tensor([0.0, 50.0])])
        labels = torch.arange(2).repeat_interleave(len(ROWS))
        # The logit of the class falls (or rises) along x, which separates the small group from its cluster.
        head = LinearHead(
            torch.tensor([[weight, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.zeros(2).double()
        )
        part = FeatureSet(features, labels, torch.cat([TRUTH, 3 + one_class(ROWS)]))
        options = PLAIN | {"k_max": 2, "overcluster": 2, "whole_classes": [1], "min_part": 45}
        config = WorstGroupConfig(methods=["dro_inferred"], subgroups=SubgroupConfig(**options))
        config.head.epochs, config.head.weight_decays = 1, [0.1]
        return dict(WorstGroup(config)(FeatureSplits(part, part, part, head=head)))[
            "worst_group/subgroups/count"
        ]

    # Only the part of 200 samples is large enough: it is kept if its loss is the higher one.
    assert groups_with(1.0) == 4.0
    assert groups_with(-1.0) == 3.0


def test_umap_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        ImportError, match="needs the package umap-learn, which is not installed: pip install"
    ):
        infer_groups(ROWS, one_class(ROWS), SubgroupConfig(reduce="umap"))


def test_umap_has_two_dimensions_by_default(monkeypatch):
    """A stand-in of its interface: the first features."""

    asked: dict = {}

    class UMAP:
        def __init__(self, **arguments) -> None:
            asked.update(arguments)

        def fit_transform(self, rows):
            return self.transform(rows)

        def transform(self, rows):
            return rows[:, : asked["n_components"]]

    monkeypatch.setitem(sys.modules, "umap", type("umap", (), {"UMAP": UMAP}))
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rows[:20, 0] += 20
    config = SubgroupConfig(reduce="umap", k_max=4, normalize=False, cluster="kmeans")
    found = infer_groups(rows, one_class(rows), config)
    assert (asked["n_components"], asked["n_neighbors"], asked["min_dist"]) == (2, 10, 0.0)
    assert recovery(found.groups, (torch.arange(40) < 20).long()) == (1.0, 1.0)
    infer_groups(rows, one_class(rows), SubgroupConfig(reduce="umap", dimensions=3, k_max=2))
    assert asked["n_components"] == 3


@pytest.mark.slow  # the import of umap compiles functions
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_separates_groups():
    rows = torch.cat([ROWS, torch.zeros(len(ROWS), 6)], dim=1)[:, :8]
    found = infer_groups(rows, one_class(rows), SubgroupConfig(reduce="umap", normalize=False, k_max=4))
    assert recovery(found.groups, TRUTH).purity > 0.95
    assert (found.predict(rows, one_class(rows)) == found.groups).float().mean() > 0.95


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SubgroupConfig(score="mean"), 'score must be "clusters" or "samples", got .mean.'),
        (lambda: SubgroupConfig(n_init=0), "subgroups.n_init must be at least 1, got 0"),
        (lambda: SubgroupConfig(dimensions=0), "subgroups.dimensions must be at least 1, got 0"),
        (lambda: SubgroupConfig(min_part=0), "subgroups.min_part must be at least 1, got 0"),
        (lambda: SubgroupConfig(min_val_part=-1), "subgroups.min_val_part must be at least 0, got -1"),
        (lambda: SubgroupConfig(min_part_share=1.0), r"min_part_share must be in \[0, 1\), got 1.0"),
        (lambda: split(torch.ones(3)), r"losses must be finite, of shape \[N\]=\[440\] .* got shape \[3\]"),
        (
            lambda: split(validation=(ROWS, one_class(ROWS)[:2])),
            r"labels must be int64 of shape \[N\]=\[440\]",
        ),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
