"""Inferred subgroups, GroupDRO and the worst group, against hand-made cases and loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.feature_cases import numbers

from pysupcon.evaluators import (
    BootstrapConfig,
    FeatureSet,
    FeatureSplits,
    GroupDRO,
    HeadConfig,
    LinearHead,
    SubgroupConfig,
    WorstGroup,
    WorstGroupConfig,
    infer_groups,
    recovery,
    with_intervals,
)
from pysupcon.evaluators.group_dro import GroupedFeatures, fit_head, group_batches
from pysupcon.evaluators.worst_group import true_groups


def clustered(counts: list[list[int]], *, width: int = 6, noise: float = 0.1, seed: int = 0):
    """Rows of clusters, ``counts[c][k]`` of cluster k in class c; features, classes, cluster within the
    class."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(len, counts))
    centres = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0][:total]
    rows, classes, parts = [], [], []
    for c, sizes in enumerate(counts):
        for k, size in enumerate(sizes):
            centre = centres[sum(map(len, counts[:c])) + k]
            rows.append(centre + noise * torch.randn(size, 16, generator=generator))
            classes += [c] * size
            parts += [k] * size
    order = torch.randperm(len(classes), generator=generator)
    return torch.cat(rows)[order], torch.tensor(classes)[order], torch.tensor(parts)[order]


# Subgroups


@pytest.mark.parametrize("reduce", ["none", "pca"])
@pytest.mark.parametrize("cluster", ["kmeans", "gmm"])
def test_separate_clusters_are_found_counted_and_assigned(reduce, cluster):
    features, classes, parts = clustered([[40, 15, 25], [30, 12]])
    config = SubgroupConfig(reduce=reduce, cluster=cluster, k_max=5, dimensions=4)
    found = infer_groups(features, classes, config)
    assert found.parent.tolist() == [0, 0, 0, 1, 1]  # three and two clusters, by silhouette
    assert torch.equal(found.parent[found.groups], classes)
    assert recovery(found.groups, 10 * classes + parts) == (1.0, 1.0)
    assert min(found.silhouettes) > 0.5
    # New samples of the same clusters get the same groups as those that stand nearest to them.
    new, new_classes, new_parts = clustered([[9, 9, 9], [9, 9]], seed=1)
    assigned = found.predict(new, new_classes)
    for sample in range(len(new)):
        same = (classes == new_classes[sample]) & (parts == new_parts[sample])
        assert assigned[sample] == found.groups[same][0]
    assert found.predict(new[:2], torch.tensor([7, -3])).tolist() == [-1, -1]


def test_classes_too_small_or_collapsed_are_one_group():
    features, classes, _ = clustered([[30, 30]])
    features = torch.cat([features, torch.ones(20, 16), torch.eye(16)[:2]])
    classes = torch.cat([classes, torch.full((20,), 5), torch.full((2,), 8)])
    found = infer_groups(features, classes, SubgroupConfig(k_max=4))
    assert found.parent.tolist() == [0, 0, 5, 8]
    assert found.silhouettes[1:] == [0.0, 0.0]
    assert found.predict(torch.ones(1, 16), torch.tensor([5])).tolist() == [2]


def test_subgroups_are_deterministic_and_scale_free_when_normalised():
    features, classes, _ = clustered([[20, 20], [20, 20]], noise=0.3)
    first = infer_groups(features, classes)
    assert torch.equal(infer_groups(features, classes).groups, first.groups)
    lengths = 1 + torch.rand(len(features), 1)
    assert torch.equal(infer_groups(features * lengths, classes).groups, first.groups)


def brute_recovery(groups: list[int], truth: list[int]) -> tuple[float, float]:
    """Every one-to-one matching tried."""
    clusters, true = sorted(set(groups)), sorted(set(truth))

    def f1(t: int, c: int) -> float:
        both = sum(g == c and y == t for g, y in zip(groups, truth, strict=True))
        return 2 * both / (groups.count(c) + truth.count(t))

    padded = clusters + [-1] * len(true)
    best = max(
        sum(f1(t, c) for t, c in zip(true, chosen, strict=True) if c != -1)
        for chosen in itertools.permutations(padded, len(true))
    )
    pure = sum(
        max(sum(g == c and y == t for g, y in zip(groups, truth, strict=True)) for t in true)
        for c in clusters
    )
    return best / len(true), pure / len(groups)


@pytest.mark.parametrize(("clusters", "true"), [(2, 3), (3, 3), (4, 2)])
def test_recovery_equals_brute_force(clusters, true):
    generator = torch.Generator().manual_seed(clusters * 10 + true)
    groups = torch.randint(clusters, (25,), generator=generator)
    truth = torch.where(
        torch.rand(25, generator=generator) < 0.5,
        groups % true,
        torch.randint(true, (25,), generator=generator),
    )
    assert recovery(groups + 4, truth) == pytest.approx(brute_recovery(groups.tolist(), truth.tolist()))


# GroupDRO


def test_weights_follow_the_formula():
    counts = torch.tensor([100, 4, 25])
    objective = GroupDRO(counts, eta=0.3, adjustment=2.0)
    losses, groups = torch.tensor([1.0, 3.0, 0.5, 2.0]), torch.tensor([0, 0, 1, 2])
    value = objective(losses, groups)
    means = np.array([2.0, 0.5, 2.0])
    q = np.exp(0.3 * (means + 2 / np.sqrt([100, 4, 25]))) / 3
    q /= q.sum()
    assert objective.weights.tolist() == pytest.approx(q.tolist())
    assert value.item() == pytest.approx(float(q @ means))
    # Next batch without group 1: its weight changes by the normalisation only.
    objective(torch.tensor([1.0, 1.0]), torch.tensor([0, 2]))
    q = q * np.exp(0.3 * (np.array([1 + 0.2, 0, 1 + 0.4])) * np.array([1, 0, 1]))
    assert objective.weights.tolist() == pytest.approx((q / q.sum()).tolist())


def test_gradient_is_that_of_the_weighted_groups_and_huge_losses_stay_finite():
    objective = GroupDRO(torch.tensor([3, 1]), eta=0.0)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
    objective(losses, torch.tensor([0, 0, 0, 1])).backward()
    assert losses.grad.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    fast = GroupDRO(torch.tensor([1, 1]), eta=100.0)
    fast(torch.tensor([1e4, 1.0]), torch.tensor([0, 1]))
    assert fast.weights.tolist() == pytest.approx([1.0, 0.0])


def test_uniform_batches_hold_every_group_equally_often_and_shuffled_ones_every_sample_once():
    groups = torch.tensor([0] * 900 + [1] * 60 + [2] * 40)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([torch.cat(list(group_batches(groups, 64, True, generator))) for _ in range(4)])
    assert (torch.bincount(groups[drawn]) / len(drawn)).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    once = list(group_batches(groups, 64, False, generator))
    assert torch.equal(torch.cat(once).sort().values, torch.arange(1000))
    assert {len(batch) for batch in once} == {64, 1000 % 64}


def spurious(n: int, seed: int, minority: float) -> FeatureSet:
    """Class by a weak feature, and by a strong one that is wrong for a minority; fine label 2 * class +
    attribute."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    strange = torch.rand(n, generator=generator) < minority
    attribute = torch.where(strange, 1 - label, label)
    core = (2 * label - 1) + 0.6 * torch.randn(n, generator=generator)
    shortcut = 2 * (2 * attribute - 1) + 0.3 * torch.randn(n, generator=generator)
    rows = torch.stack([core, shortcut, torch.randn(n, generator=generator)], dim=1)
    return FeatureSet(rows, label, 2 * label + attribute)


@pytest.fixture(scope="module")
def shortcut() -> FeatureSplits:
    return FeatureSplits(spurious(600, 0, 0.04), spurious(200, 1, 0.5), spurious(400, 2, 0.5))


QUICK = HeadConfig(epochs=12, weight_decays=[0.1], learning_rate=0.02)


@pytest.fixture(scope="module")
def judged(shortcut) -> dict:
    config = WorstGroupConfig(head=QUICK, auroc=True, subgroups=SubgroupConfig(normalize=False, k_max=4))
    return dict(WorstGroup(config)(shortcut))


def test_group_dro_raises_the_worst_group_where_erm_follows_the_shortcut(judged):
    worst = {m: judged[f"worst_group/{m}/worst_group_accuracy"] for m in ("erm", "dro_inferred", "dro_true")}
    assert worst["erm"] < 0.6
    assert worst["dro_true"] > worst["erm"] + 0.25
    assert worst["dro_inferred"] > worst["erm"] + 0.25
    assert judged["worst_group/subgroups/f1"] > 0.9
    assert judged["worst_group/subgroups/purity"] > 0.95


def test_figures_are_those_of_the_outcomes(judged, shortcut):
    from sklearn.metrics import roc_auc_score

    group = shortcut.test.fine  # the attribute and the class make the group, in the same order
    for method in ("erm", "dro_inferred", "dro_true"):
        prefix = f"worst_group/{method}"
        correct = judged[f"{prefix}/correct"]
        assert torch.equal(judged[f"{prefix}/group"], group)
        assert torch.equal(correct, judged[f"{prefix}/predicted"] == shortcut.test.coarse)
        by_group = [correct[group == g].double().mean().item() for g in range(4)]
        for g in range(4):
            assert judged[f"{prefix}/group={g}/accuracy"] == by_group[g]
        assert judged[f"{prefix}/worst_group_accuracy"] == min(by_group)
        assert judged[f"{prefix}/accuracy"] == correct.double().mean()
        area = roc_auc_score(shortcut.test.coarse, judged[f"{prefix}/score"])
        assert judged[f"{prefix}/auroc"] == pytest.approx(area)
        assert judged[f"{prefix}/worst_group_auroc"] < area
    for g in range(4):
        assert judged[f"worst_group/group={g}/train"] == (shortcut.train.fine == g).sum()
        assert (judged[f"worst_group/group={g}/class"], judged[f"worst_group/group={g}/fine"]) == (g // 2, g)


def test_erm_does_not_look_at_the_groups_and_selection_does(shortcut):
    train, val = shortcut.train, shortcut.val
    config = HeadConfig(epochs=4, weight_decays=[0.0, 0.3], learning_rate=0.1)

    def fit(train_groups, val_groups, robust=False):
        return fit_head(
            GroupedFeatures(train.features, train.coarse, train_groups),
            GroupedFeatures(val.features, val.coarse, val_groups),
            2,
            config,
            robust=robust,
        )

    a, b = fit(train.fine, val.fine), fit(train.coarse, val.fine)
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(fit(train.fine, val.fine, robust=True).weight, a.weight)
    # What is kept is the best worst group on validation, as its own predictions say.
    predicted = a.logits(val.features).argmax(dim=1)
    by_group = [(predicted == val.coarse)[val.fine == g].double().mean().item() for g in range(4)]
    assert a.val_worst_group == pytest.approx(min(by_group))
    by_class = fit(train.fine, val.coarse)
    assert by_class.val_worst_group >= a.val_worst_group
    plain = numbers(WorstGroup(WorstGroupConfig(methods=["erm"], head=config))(shortcut))
    known = plain["worst_group/erm/val_worst_group"]
    true = numbers(WorstGroup(WorstGroupConfig(methods=["erm"], head=config, selection="true"))(shortcut))
    assert known == pytest.approx(by_class.val_worst_group)
    assert true["worst_group/erm/val_worst_group"] == pytest.approx(a.val_worst_group)


def test_the_trained_head_is_judged_where_there_is_one(shortcut):
    weight = torch.tensor([[0.0, 9.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.5, 0.0]], dtype=torch.float64)
    config = WorstGroupConfig(methods=["trained"], auroc=True)

    def judged_with(head, labels=lambda part: part.coarse + 1):  # labels 1 and 2: row 0 is of no class here
        splits = (FeatureSet(s.features, labels(s), s.fine) for _, s in shortcut.items())
        return dict(WorstGroup(config)(FeatureSplits(*splits, head=head)))

    found = judged_with(LinearHead(weight, torch.zeros(3, dtype=torch.float64)))
    scores = shortcut.test.features.double() @ weight[1:].T
    predicted = scores.argmax(dim=1)
    assert torch.equal(found["worst_group/trained/predicted"], predicted + 1)
    right = predicted == shortcut.test.coarse
    by_group = [right[shortcut.test.fine == g].double().mean().item() for g in range(4)]
    assert found["worst_group/trained/worst_group_accuracy"] == min(by_group) < max(by_group)
    assert torch.equal(found["worst_group/trained/score"], scores[:, 1] - scores[:, 0])
    assert not any("weight_decay" in name or "val_worst" in name for name in found)
    assert not any("/trained/" in name for name in judged_with(None))
    with pytest.raises(
        ValueError, match=r"head.weight must have the shape \[C, D\] with D=3, .* got \[3, 2\]"
    ):
        judged_with(LinearHead(weight[:, :2], torch.zeros(3)))


def test_the_adjusted_accuracy_has_the_proportions_of_the_training_groups(shortcut):
    weight = torch.tensor([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    head = LinearHead(weight, torch.zeros(2, dtype=torch.float64))
    splits = FeatureSplits(shortcut.train, shortcut.val, shortcut.test, head=head)
    config = WorstGroupConfig(methods=["trained"], adjusted=True)
    found = dict(WorstGroup(config)(splits))
    shares = torch.bincount(shortcut.train.fine).double() / len(shortcut.train)
    accuracies = torch.tensor([found[f"worst_group/trained/group={g}/accuracy"] for g in range(4)])
    expected = float(shares @ accuracies.double())
    assert found["worst_group/trained/adjusted_accuracy"] == pytest.approx(expected)
    assert expected > found["worst_group/trained/accuracy"] + 0.3  # the shortcut holds for most of them
    intervals = dict(with_intervals(found.items(), BootstrapConfig(resamples=50)))
    assert intervals["worst_group/trained/adjusted_accuracy/low"] <= expected
    plain = dict(WorstGroup(WorstGroupConfig(methods=["trained"]))(splits))
    assert "worst_group/trained/adjusted_accuracy" not in plain


def test_validation_samples_of_no_group_do_not_select_the_head(shortcut):
    train, val = shortcut.train, shortcut.val
    config = HeadConfig(epochs=3, weight_decays=[0.1])
    hidden = torch.where((val.fine == 1) | (val.fine == 2), -1, val.fine)  # where the shortcut is wrong
    fitted = fit_head(
        GroupedFeatures(train.features, train.coarse, train.fine),
        GroupedFeatures(val.features, val.coarse, hidden),
        2,
        config,
        robust=False,
    )
    correct = fitted.logits(val.features).argmax(dim=1) == val.coarse
    shown = [correct[hidden == g].double().mean().item() for g in (0, 3)]
    assert fitted.val_worst_group == pytest.approx(min(shown))
    assert correct[hidden == -1].double().mean().item() < min(shown)


def test_the_robust_loss_keeps_its_precision_under_autocast():
    losses, groups = torch.rand(64) * 1e-3 + 1, torch.arange(64) % 3
    plain, cast = (GroupDRO(torch.tensor([9, 9, 9]), eta=0.5) for _ in range(2))
    expected = plain(losses, groups)
    with torch.autocast("cpu", torch.bfloat16):
        found = cast(losses, groups)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(cast.weights, plain.weights)


def test_true_groups_are_numbered_over_all_splits():
    def one(coarse, fine):
        return FeatureSet(torch.ones(len(fine), 2), torch.tensor(coarse), torch.tensor(fine))

    data = FeatureSplits(one([0, 1], [3, 3]), one([1], [0]), one([1, 0, 1], [3, 5, 0]))
    groups = true_groups(data)
    assert groups.pairs.tolist() == [[0, 3], [0, 5], [1, 0], [1, 3]]
    assert groups.indices(data.test).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SubgroupConfig(reduce="lda"), "subgroups.reduce must be .* got 'lda'"),
        (lambda: SubgroupConfig(cluster="tree"), "subgroups.cluster must be .* got 'tree'"),
        (lambda: SubgroupConfig(k_min=1), "must be 2 <= k_min <= k_max, got 1 and 10"),
        (lambda: SubgroupConfig(k_min=5, k_max=4), "must be 2 <= k_min <= k_max, got 5 and 4"),
        (lambda: SubgroupConfig(overcluster=0), "subgroups.overcluster must be at least 1, got 0"),
        (
            lambda: SubgroupConfig(silhouette_samples=10),
            "silhouette_samples must be more than k_max=10, got 10",
        ),
        (lambda: HeadConfig(epochs=0), "head.epochs must be at least 1, got 0"),
        (lambda: HeadConfig(learning_rate=0.0), "head.learning_rate must be > 0, got 0.0"),
        (lambda: HeadConfig(weight_decays=[]), r"head.weight_decays must be .* got \[\]"),
        (lambda: HeadConfig(eta=-1.0), "head.eta must be >= 0, got -1.0"),
        (lambda: WorstGroupConfig(methods=["erm", "erm"]), "each once, got"),
        (lambda: WorstGroupConfig(methods=["jtt"]), r"worst_group.methods must be .* got \['jtt'\]"),
        (lambda: WorstGroupConfig(selection="test"), "worst_group.selection must be .* got 'test'"),
        (lambda: GroupDRO(torch.tensor([3, 0])), r"counts must be .* at least 1, got \[3, 0\]"),
        (lambda: GroupDRO(torch.tensor([3]), eta=math.nan), "eta and adjustment must be >= 0, got nan"),
        (
            lambda: GroupDRO(torch.tensor([3]))(torch.ones(2), torch.zeros(3, dtype=torch.int64)),
            r"groups must be of shape \[B\]=\[2\] .* got \[3\]",
        ),
        (
            lambda: infer_groups(torch.ones(3, 2), torch.zeros(3)),
            r"labels must be int64 of shape \[N\]=\[3\] .* got torch.float32 of shape \[3\]",
        ),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
