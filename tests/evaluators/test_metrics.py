"""Metrics of outcomes, their intervals and the losses over all pairs, against loops and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.feature_cases import blobs, numbers, splits

from pysupcon import functional
from pysupcon.evaluators import (
    BootstrapConfig,
    BoundMetric,
    FeatureSet,
    FeatureSplits,
    Pairs,
    PairsConfig,
    Separation,
    SeparationConfig,
    kl_bound,
    loss_floors,
    pair_statistics,
    permutation_sensitivity,
    with_intervals,
)
from pysupcon.evaluators.bootstrap import bootstrap_values
from pysupcon.evaluators.invariance import permute_within_classes
from pysupcon.evaluators.metrics import (
    METRICS,
    average_precision,
    binary_auroc,
    bind_metric,
    margin,
    metric_results,
    roc_auc,
    worst_group,
    worst_group_auroc,
)
from pysupcon.evaluators.pairs import simplex_gap

# Statistics


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, hardly any
def test_areas_under_curves_equal_scikit_learn_with_ties(levels):
    from sklearn.metrics import average_precision_score, roc_auc_score

    generator = torch.Generator().manual_seed(levels)
    positive = torch.randint(1, levels + 1, (4, 23), generator=generator).float()
    negative = torch.randint(levels, (4, 31), generator=generator).float()
    for row in range(4):
        truth = [1] * 23 + [0] * 31
        scores = torch.cat([positive[row], negative[row]]).numpy()
        assert roc_auc(positive, negative)[row] == pytest.approx(roc_auc_score(truth, scores))
        assert average_precision(positive, negative)[row] == pytest.approx(
            average_precision_score(truth, scores)
        )


def test_worst_group_by_hand():
    correct = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    group = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]])
    # Group 2 is wrong throughout; in the second row it has no sample and does not count.
    assert worst_group(correct, group).tolist() == pytest.approx([0, 2 / 3])


def test_margin_takes_the_middle_of_an_even_number():
    target, noise = torch.tensor([0.9, 0.5, 0.7, 0.8]), torch.tensor([0.1, 0.2, 0.3, 0.6])
    assert margin(target, noise) == pytest.approx(0.5)


def test_auroc_of_all_and_of_the_worst_group():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    group = torch.arange(60) % 4  # groups 0 and 1 are negative, 2 and 3 positive
    positive = group >= 2
    score = torch.randn(60, generator=generator) + positive + 0.8 * (group == 1)
    assert binary_auroc(score[None], positive[None]).item() == pytest.approx(roc_auc_score(positive, score))
    expected = []
    for g in range(4):
        keep = (group == g) | (positive != (g >= 2))
        expected.append(roc_auc_score(positive[keep], score[keep]))
    found = worst_group_auroc(score[None], positive[None], group[None]).item()
    assert found == pytest.approx(min(expected))
    assert binary_auroc(score[None, :2], positive[None, :2]).item() == 0.5  # one class only


def test_figures_are_found_by_name_and_leave_out_what_is_missing():
    outcomes = {
        "a/correct": torch.tensor([True, False, True, True]),
        "a/class": torch.tensor([0, 0, 1, 1]),
        "a/target": torch.tensor([0.9, math.nan, 0.5, 0.7]),
        "a/noise": torch.tensor([0.1, math.nan, 0.2, 0.3]),
    }

    def value(name: str) -> float:
        figure = bind_metric(name, outcomes)
        assert figure is not None
        return figure.value()

    assert value("a/accuracy") == 0.75
    assert value("a/class=0/accuracy") == 0.5
    assert value("a/target_median") == pytest.approx(0.7)  # not NaN: the second sample does not count
    assert value("a/class=1/margin") == pytest.approx(0.6 - 0.25)
    for name in ("a/chance", "b/accuracy", "a/group=0/accuracy", "a/class=7/accuracy", "accuracy"):
        assert bind_metric(name, outcomes) is None
    with pytest.raises(ValueError, match=r"a/auroc cannot be computed from the outcomes \['correct'\]"):
        list(metric_results("a", ["auroc"], {"correct": outcomes["a/correct"]}))


def test_intervals_of_every_statistic_are_percentiles_of_resampled_samples():
    """Against numpy, resample by resample, with the seeded indices drawn again."""
    generator = torch.Generator().manual_seed(3)
    n, config = 40, BootstrapConfig(resamples=50, seed=5, confidence=0.8)
    outcomes = {
        "x/correct": torch.rand(n, generator=generator) < 0.6,
        "x/group": torch.randint(3, (n,), generator=generator),
        "x/target": torch.rand(n, generator=generator) + 0.3,
        "x/noise": torch.rand(n, generator=generator),
    }
    results = [*((f"x/{figure}", 0.5) for figure in ("worst_group_accuracy", "margin")), *outcomes.items()]
    found = numbers(with_intervals(results, config))
    drawn = torch.randint(n, (50, n), generator=torch.Generator().manual_seed(5))
    correct, group, target, noise = (outcome.numpy() for outcome in outcomes.values())
    worst = [min(correct[i][group[i] == g].mean() for g in range(3)) for i in drawn.numpy()]
    margins = [abs(np.median(target[i]) - np.median(noise[i])) for i in drawn.numpy()]
    for name, values in (("worst_group_accuracy", worst), ("margin", margins)):
        low, high = np.quantile(values, [0.1, 0.9])
        assert found[f"x/{name}/low"] == pytest.approx(low)
        assert found[f"x/{name}/high"] == pytest.approx(high)


def test_paired_differences_are_narrower_than_unpaired_ones():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(500, generator=generator) < 0.4
    a, b = ~hard, ~hard & (torch.rand(500, generator=generator) < 0.97)
    figures = [bind_metric("m/accuracy", {"m/correct": outcome}) for outcome in (a, b)]
    first, second = (bootstrap_values(figure, BootstrapConfig(seed=1)) for figure in figures)
    apart = bootstrap_values(figures[1], BootstrapConfig(seed=2))
    assert (first - second).std() < 0.4 * (first - apart).std()


# Separation by class


def test_separation_by_class_equals_scikit_learn():
    from sklearn.metrics import average_precision_score, roc_auc_score

    data = splits(distance=0.7)
    results = dict(Separation()(data))
    for level in ("fine", "coarse"):
        target, noise = (results[f"separation/{level}/{kind}"].numpy() for kind in ("target", "noise"))
        labels = data.test.labels(level).numpy()
        assert np.array_equal(results[f"separation/{level}/class"].numpy(), labels)
        assert results[f"separation/{level}/margin"] == pytest.approx(
            abs(np.median(target) - np.median(noise))
        )
        for label in np.unique(labels):
            mine = labels == label
            truth, scores = np.repeat([1, 0], mine.sum()), np.concatenate([target[mine], noise[mine]])
            prefix = f"separation/{level}/class={label}"
            assert results[f"{prefix}/roc_auc"] == pytest.approx(roc_auc_score(truth, scores))
            assert results[f"{prefix}/average_precision"] == pytest.approx(
                average_precision_score(truth, scores)
            )
    short = numbers(Separation(SeparationConfig(per_class=False))(data))
    assert short == {name: value for name, value in numbers(results.items()).items() if "class=" not in name}


# Pairs


def loops(features: torch.Tensor, labels: list[int], temperature: float) -> dict[str, list[float]]:
    """Losses and signs of gradients of every anchor by autograd, from the definition, one anchor at a
    time."""
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    found: dict[str, list[float]] = {"supcon": [], "sincere": [], "supcon_repels": [], "sincere_repels": []}
    for i, own in enumerate(labels):
        s = (rows @ rows[i] / temperature).requires_grad_()
        positives = [j for j, label in enumerate(labels) if label == own and j != i]
        negatives = [j for j, label in enumerate(labels) if label != own]
        if not positives:
            for name in ("supcon", "sincere"):
                found[name].append(math.nan)
                found[f"{name}_repels"].append(0)
            continue
        everyone = torch.stack([s[j].exp() for j in positives + negatives]).sum()
        away = sum((s[j].exp() for j in negatives), torch.zeros((), dtype=torch.float64))
        losses = {
            "supcon": -sum(torch.log(s[p].exp() / everyone) for p in positives) / len(positives),
            "sincere": -sum(torch.log(s[p].exp() / (s[p].exp() + away)) for p in positives) / len(positives),
        }
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
            found[name].append(loss.item())
            found[f"{name}_repels"].append(sum(gradient[p].item() > 1e-12 for p in positives))
    return found


@pytest.mark.parametrize("temperature", [0.1, 0.3])
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 26])  # a row at a time, ragged blocks, one block
def test_pair_table_equals_autograd_of_the_definition(temperature, chunk_bytes):
    features = blobs(26, distance=0.7, seed=4).features
    labels = torch.tensor([0, 1, 2, 0, 1] * 5 + [9])  # the last is alone in its class
    table = pair_statistics(features, labels, temperature, chunk_bytes=chunk_bytes)
    expected = loops(features, labels.tolist(), temperature)
    for name, values in expected.items():
        found = getattr(table, name).double()
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), equal_nan=True)
    assert table.positives.tolist() == [int((labels == y).sum()) - 1 for y in labels]
    assert table.negatives.tolist() == [int((labels != y).sum()) for y in labels]
    assert 0 < table.supcon_repels.sum() < table.positives.sum()
    assert table.sincere_repels.sum() == 0


def test_pair_losses_are_those_that_are_trained():
    data = blobs(40, distance=0.7)
    table = pair_statistics(data.features, data.fine, 0.2)
    arguments = {"temperature": 0.2, "normalize": True, "reduction": "none", "backend": "reference"}
    torch.testing.assert_close(table.supcon, functional.supcon(data.features, data.fine, **arguments))
    torch.testing.assert_close(table.sincere, functional.sincere(data.features, data.fine, **arguments))


def test_pairs_yields_means_bounds_and_shares():
    data = splits(distance=1.5)
    found = dict(Pairs(PairsConfig(temperature=0.3))(data))
    table = pair_statistics(data.test.features, data.test.fine, 0.3)
    bound = table.negatives.double().log() - table.sincere
    assert found["pairs/fine/kl_bound"] == pytest.approx(bound.mean().item())
    for label in range(6):
        expected = bound[data.test.fine == label].mean().item()
        assert found[f"pairs/fine/class={label}/kl_bound"] == pytest.approx(expected)
    assert found["pairs/fine/kl_bound"] < found["pairs/fine/kl_limit"] == pytest.approx(math.log(75))
    share = table.supcon_repels.sum() / table.positives.sum()
    assert found["pairs/fine/supcon_repelling"] == pytest.approx(share.item())
    assert found["pairs/fine/sincere_repelling"] == 0
    assert found["pairs/fine/supcon_loss"] > found["pairs/fine/supcon_floor"]
    # The outcomes are the test samples'; of another split there are none.
    assert found["pairs/fine/bound"].shape == (90,)
    train = dict(Pairs(PairsConfig(split="train", per_class=False))(data))
    assert not [name for name, value in train.items() if isinstance(value, torch.Tensor) or "class=" in name]


def test_pairs_of_one_class_or_singletons_yield_nothing():
    one = FeatureSet(torch.eye(4), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert list(Pairs()(FeatureSplits(one, one, one))) == []


def test_kl_bound_is_below_the_divergence_of_known_gaussians():
    """Symmetrised KL of two unit Gaussians at distance d in one dimension is d squared; the critic is the
    cosine of two-dimensional rows, so the bound need not be tight, but must hold, and grow with d."""
    bounds = []
    for distance in (0.5, 1.5, 3.0):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(400) % 2
        x = torch.randn(400, generator=generator, dtype=torch.float64) + distance * labels
        angle = x.clamp(-3, 6) / 4
        table = pair_statistics(torch.stack([angle.cos(), angle.sin()], dim=1), labels, 1.0)
        bounds.append(kl_bound(table.sincere, table.negatives).mean().item())
        assert bounds[-1] < distance**2 + 0.1
    assert bounds == sorted(bounds)
    assert kl_bound(torch.tensor([0.0, 1.0]), torch.tensor([5, 0])).tolist() == pytest.approx(
        [math.log(5), math.nan], nan_ok=True
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_floors_are_reached_by_a_simplex_and_never_passed(classes, temperature):
    labels = torch.arange(classes).repeat_interleave(4)
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    table = pair_statistics(simplex[labels], labels, temperature)
    gap = simplex_gap(labels)
    assert gap == pytest.approx(classes / (classes - 1))
    floors = loss_floors(table.positives, table.negatives, temperature, gap=gap)
    torch.testing.assert_close(table.supcon, floors["supcon"])
    torch.testing.assert_close(table.sincere, floors["sincere"])
    generator = torch.Generator().manual_seed(0)
    for scale in (0.05, 0.3, 3.0):
        rows = simplex[labels] + scale * torch.randn(4 * classes, classes, generator=generator)
        moved = pair_statistics(rows, labels, temperature)
        assert moved.supcon.mean() > floors["supcon"].mean()
        assert moved.sincere.mean() > floors["sincere"].mean()
    assert simplex_gap(torch.tensor([0, 0, 1])) == 2.0


def test_floor_of_cnce_is_below_what_descent_reaches():
    torch.manual_seed(1)
    labels = torch.zeros(3, dtype=torch.int64)
    points = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([points], 0.05)

    def loss() -> torch.Tensor:
        views = torch.nn.functional.normalize(points, dim=1)[:, None].expand(-1, 2, -1)
        return functional.class_conditional_info_nce(views, labels, temperature=0.5, backend="reference")

    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    counts = torch.tensor([5])
    floor = loss_floors(counts, torch.tensor([0]), 0.5)["class_conditional_info_nce"].item()
    assert floor == pytest.approx(math.log(1 + 4 * math.exp(-4)))
    # Three directions in a plane: cosines of -1/2, four of the five other rows.
    assert loss().item() == pytest.approx(math.log(1 + 4 * math.exp(-3)), rel=1e-3)
    assert loss().item() > floor


# Permutation invariance


def test_supervised_losses_are_blind_to_permutations_within_a_class_and_reconstruction_is_not():
    data = blobs(24, seed=2)
    views = torch.stack([data.features, data.features + 0.1], dim=1)
    images = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for loss in (
        lambda z: functional.supcon(z, data.coarse, temperature=0.5, normalize=True),
        lambda z: functional.spread(z, data.coarse, temperature=0.5, normalize=True),
    ):
        assert permutation_sensitivity(loss, views, data.coarse) < 1e-12
    # The views of a sample no longer go together: cNCE notices, so the test above could have failed.
    order = permute_within_classes(data.coarse, torch.Generator().manual_seed(1))
    torn = torch.stack([views[:, 0], views[order, 1]], dim=1)
    assert abs(functional.spread(torn, data.coarse) - functional.spread(views, data.coarse)) > 1e-3
    assert permutation_sensitivity(lambda z: (z[:, 0] - images).square().mean(), views, data.coarse) > 1e-3


def test_permutations_stay_within_their_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 1])
    order = permute_within_classes(labels, torch.Generator().manual_seed(0))
    assert torch.equal(labels[order], labels)
    assert torch.equal(order.sort().values, torch.arange(8))
    assert not torch.equal(order, torch.arange(8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PairsConfig(temperature=0.0), "pairs.temperature must be > 0, got 0.0"),
        (lambda: PairsConfig(split="dev"), "pairs.split must be .* got 'dev'"),
        (lambda: PairsConfig(chunk_bytes=0), "pairs.chunk_bytes must be positive, got 0"),
        (
            lambda: loss_floors(torch.tensor([1]), torch.tensor([1]), 1.0, gap=3.0),
            r"gap in \(0, 2\], got 1.0 and 3",
        ),
        (
            lambda: permutation_sensitivity(torch.sum, torch.ones(3, 2), torch.zeros(2)),
            r"labels must be of shape \[N\]=\[3\] .* got \[2\]",
        ),
        (
            lambda: permutation_sensitivity(torch.sum, torch.ones(3, 2), torch.zeros(3), permutations=0),
            "permutations must be at least 1, got 0",
        ),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_statistic_is_a_vector_of_resamples():
    outcomes = {
        "correct": torch.rand(5, 9) < 0.5,
        "positive": torch.rand(5, 9) < 0.5,
        "group": torch.randint(2, (5, 9)),
        "positives": torch.ones(5, 9),
    }
    for name, metric in METRICS.items():
        values = metric.compute(*(outcomes.get(k, torch.rand(5, 9)) for k in metric.outcomes))
        assert values.shape == (5,), name
        assert values.dtype == torch.float64, name


@pytest.mark.parametrize("name", [name for name, found in METRICS.items() if found.from_counts])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_counts_of_draws_give_the_same_values(name: str, n: int) -> None:
    """Bitwise, also where a resample has no sample of a group."""
    generator = torch.Generator().manual_seed(n)
    correct = torch.rand(n, generator=generator) < 0.7
    group = torch.randint(4, (n,), generator=generator)
    definition = METRICS[name]
    outcomes = [correct, group][: len(definition.outcomes)]
    config = BootstrapConfig(resamples=300, seed=n)
    slow = BoundMetric(definition._replace(from_counts=None), outcomes)
    assert torch.equal(
        bootstrap_values(BoundMetric(definition, outcomes), config), bootstrap_values(slow, config)
    )
