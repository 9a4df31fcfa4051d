"""The mathematics of the studies in benchmarks/papers: threshold of alpha, repulsion, and the KL bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers import kl_bound, repulsion, small_training, threshold
from benchmarks.papers.study import ROOT
from pysupcon import functional


def smallest_curvature(
    alpha: float, base: str, classes: int, samples: int, dim: int, tau: float, gap: float | None
) -> float:
    """Smallest curvature of L_spread over all moves that leave the class means where they are, at the
    collapsed configuration (fp64 Hessian in tangent coordinates)."""
    corners = torch.eye(classes, dim, dtype=torch.float64)
    if gap is None:
        corners = F.normalize(corners - corners.mean(dim=0), dim=1)
    _, _, basis = torch.linalg.svd(corners[:, None])  # per class, the rows after the first are tangent
    tangents = basis[:, 1:]
    labels = torch.arange(classes).repeat_interleave(samples)

    def loss(flat: Tensor) -> Tensor:
        moves = flat.view(classes, samples - 1, dim - 1)
        moves = torch.cat([moves, -moves.sum(dim=1, keepdim=True)], dim=1)  # sum 0 in each class
        points = F.normalize(corners[:, None] + moves @ tangents, dim=2).view(-1, dim)
        views = points[:, None].expand(-1, 2, -1)
        return functional.spread(views, labels, temperature=tau, alpha=alpha, base=base, backend="reference")

    start = torch.zeros(classes * (samples - 1) * (dim - 1), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, start)
    return torch.linalg.eigvalsh(hessian)[0].item()


@pytest.mark.parametrize("base", ["supcon", "sincere"])
@pytest.mark.parametrize(
    ("classes", "samples", "dim", "tau", "gap"),
    [
        (2, 4, 3, 0.5, None),  # two classes, opposite
        (3, 2, 4, 0.25, None),  # few positives: the finite-P terms count
        (2, 3, 3, 0.1, 1.0),  # orthogonal means, as after a ReLU
    ],
)
def test_alpha_star_is_where_the_hessian_becomes_indefinite(
    base: str, classes: int, samples: int, dim: int, tau: float, gap: float | None
) -> None:
    star = threshold.alpha_star(samples, classes, tau, base, gap=gap)
    below, at, above = (
        smallest_curvature(ratio * star, base, classes, samples, dim, tau, gap) for ratio in (0.98, 1.0, 1.02)
    )
    assert below > 0 > above
    assert abs(at) < 1e-3 * min(below, -above)


def test_without_room_beside_the_means_the_threshold_is_higher() -> None:
    star = threshold.alpha_star(3, 3, 0.25, "sincere")
    assert smallest_curvature(1.02 * star, "sincere", 3, 3, 2, 0.25, None) > 0


def test_alpha_star_tends_to_the_formula_of_many_positives() -> None:
    rho = 1 / (1 + math.exp(2 / 0.5))  # SupCon, two classes, N = P
    k = rho * 2
    assert threshold.alpha_star(10**6, 2, 0.5, "supcon") == pytest.approx(k / (1 + k), rel=1e-5)


def test_alpha_star_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(ValueError, match="views must be at least 2, got 4, 2 and 1"):
        threshold.alpha_star(4, 2, 0.5, "supcon", views=1)
    with pytest.raises(ValueError, match="base must be one of"):
        threshold.alpha_star(4, 2, 0.5, "cnce")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["supcon", "sincere"])
def test_free_points_collapse_below_and_spread_above(base: str) -> None:
    star = threshold.alpha_star(threshold.SAMPLES, threshold.CLASSES, 0.5, base)
    labels = torch.arange(threshold.CLASSES).repeat_interleave(threshold.SAMPLES)
    below, above = (
        threshold.spread_and_gap(threshold.free_points(ratio * star, 0.5, base, 0, steps=250), labels)[0]
        for ratio in (0.8, 1.2)
    )
    assert below < threshold.COLLAPSED < 0.1 < above


def test_spread_and_gap_of_a_hand_made_example() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]])
    spread, gap = threshold.spread_and_gap(rows, torch.tensor([0, 0, 1, 1]))
    assert spread == pytest.approx(2**-0.5 / 2)
    assert gap == pytest.approx(1 + 2**-0.5)


def test_repelled_pairs_of_a_hand_made_example() -> None:
    # Class 0: two equal rows and one at 90 degrees; class 1: three equal rows far from all.
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    shares = repulsion.repelling_shares(rows, labels, 0.1, 3, torch.Generator().manual_seed(0))
    # Only 0 -> 1 and 1 -> 0 have a softmax above 1/2, of twelve positive pairs.
    assert shares == {"supcon": pytest.approx(2 / 12), "sincere": 0.0}


def test_own_class_push_of_a_hand_made_example() -> None:
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = repulsion.own_class_push(rows, labels, 0.5, 3, torch.Generator().manual_seed(0))
    e = math.exp(1 / 0.5)
    # Rows 0 and 1 push each other; row 2 has equal similarities; the softmax of rows 3 to 5 is at most 1/2.
    own = 2 * (e / (e + 4) - 1 / 2)
    others = 2 * 3 / (e + 4) + 3 / 5 + 3 * 3 / (2 * e + 3)
    assert found == pytest.approx(own / (own + others), rel=1e-12)


def test_a_label_of_two_images_is_never_pushed() -> None:
    rows = F.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    labels = torch.arange(4).repeat_interleave(10)
    generator = torch.Generator().manual_seed(0)
    assert repulsion.own_class_push(rows, labels, 0.1, 2, generator) == 0
    gradient = _supcon_gradient(rows, labels, 0.1)
    same = (labels[:, None] == labels) & ~torch.eye(40, dtype=torch.bool)
    own = gradient[same].clamp(min=0).sum()
    expected = own / (own + gradient[labels[:, None] != labels].sum())
    found = repulsion.own_class_push(rows, labels, 0.1, 10, generator)
    assert found == pytest.approx(expected.item(), rel=1e-9)
    assert found > 0


def _supcon_gradient(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Derivative of the sum of SupCon's losses by each similarity, without the diagonal."""
    similarities = (rows @ rows.T / temperature).requires_grad_()
    itself = torch.eye(len(rows), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    log_softmax = similarities.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    loss = -(log_softmax.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)).sum()
    (gradient,) = torch.autograd.grad(loss, similarities)
    return gradient


def test_two_images_of_a_label_are_never_repelled() -> None:
    rows = F.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    labels = torch.arange(4).repeat_interleave(10)
    generator = torch.Generator().manual_seed(0)
    assert repulsion.repelling_shares(rows, labels, 0.1, 2, generator)["supcon"] == 0
    assert repulsion.repelling_shares(rows, labels, 0.1, 10, generator)["supcon"] > 0


def test_per_class_refuses_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match="count must be at most 2, the rows of class 0, got 3"):
        small_training.per_class(torch.tensor([0, 0, 1, 1, 1]), 3, torch.Generator())


@pytest.mark.parametrize(("dim", "kappa"), [(3, 2.0), (16, 5.0)])
def test_divergence_is_that_of_samples(dim: int, kappa: float) -> None:
    rows, labels = kl_bound.sample(dim, kappa, 20_000, 0)
    own, other = (rows[labels == label, 0] for label in (0, 1))
    ratio = 2 * kappa * torch.stack([own, other])  # log p+ / p- of class 0
    deviation = ratio.std(dim=1).square().sum().sqrt().item() / 20_000**0.5
    assert kl_bound.divergence(dim, kappa) == pytest.approx(
        (ratio[0] - ratio[1]).mean().item(), abs=4 * deviation
    )
    # In three dimensions A = coth(kappa) - 1 / kappa.
    if dim == 3:
        assert kl_bound.mean_cosine(dim, kappa) == pytest.approx(1 / math.tanh(kappa) - 1 / kappa)


def test_the_log_ratio_is_that_of_the_densities() -> None:
    from scipy.stats import vonmises_fisher

    rows, _ = kl_bound.sample(4, 3.0, 5, 0)
    pole = [1.0, 0, 0, 0]
    ratio = vonmises_fisher(pole, 3.0).logpdf(rows) - vonmises_fisher([-1.0, 0, 0, 0], 3.0).logpdf(rows)
    torch.testing.assert_close(torch.from_numpy(ratio), 2 * 3.0 * rows[:, 0])


@pytest.mark.parametrize("truth", kl_bound.TRUTHS)
@pytest.mark.parametrize("dim", kl_bound.DIMENSIONS)
def test_concentration_inverts_the_divergence(dim: int, truth: float) -> None:
    assert kl_bound.divergence(dim, kl_bound.concentration(dim, truth)) == pytest.approx(truth)


def test_optimal_losses_are_sincere_with_that_critic() -> None:
    rows, labels = kl_bound.sample(3, 2.0, 6, 1)
    losses = kl_bound.optimal_losses(rows, labels, 2.0)
    critic = 4.0 * rows[:, 0]
    expected = []
    for i, label in enumerate(labels):
        sign = 1 if label == 0 else -1
        away = (sign * critic[labels != label]).exp().sum()
        others = [j for j in range(12) if j != i and labels[j] == label]
        expected.append(sum(math.log1p(away / math.exp(sign * critic[j])) for j in others) / len(others))
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_the_page_shows_the_thresholds_that_the_formula_gives() -> None:
    page = (ROOT / "benchmarks/papers/README.md").read_text(encoding="utf-8")
    section = page.split("## The threshold of alpha")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| S")]
    assert len(rows) == 4
    for base, gap, *cells in rows:
        for tau, cell in zip(threshold.TEMPERATURES, cells, strict=True):
            star = threshold.alpha_star(75, 2, tau, base.strip().lower(), gap=float(gap.split()[0]))
            assert float(cell) == pytest.approx(star, rel=5e-3)


def test_the_bound_holds_and_ends_at_half_of_the_divergence() -> None:
    kappa = kl_bound.concentration(3, 2.0)
    rows, labels = kl_bound.sample(3, kappa, 2000, 0)
    bound = math.log(2000) - kl_bound.optimal_losses(rows, labels, kappa).mean().item()
    assert 0.9 < bound < 1.1


def test_tables_claims_and_pictures_of_some_records(tmp_path: Path) -> None:
    points = [{"ratio": r, "alpha": r / 9, "spread": s, "gap": 1.0} for r, s in ((0.8, 1e-4), (1.2, 0.3))]
    record = {"base": "supcon", "temperature": 0.5, "points": points}
    records = {f"{kind}_supcon_t0.5_seed{seed}": {**record, "kind": kind}
               for kind in ("free", "network") for seed in (0, 1)}  # fmt: skip
    assert "| supcon | 0.5 | 0.107 | 0.000 [0.000, 0.000] | 0.300 [0.300, 0.300] |" in threshold.tables(
        records
    )
    assert [claim.verdict for claim in threshold.claims(records)] == ["shown", "shown"]
    collapsed = [{**point, "spread": 1e-4} for point in points]
    records = {name: {**one, "points": collapsed} for name, one in records.items()}
    assert [claim.verdict for claim in threshold.claims(records)] == ["not shown", "not shown"]

    grown = [0.0, 0.5, 0.6, 0.7, 0.8]
    shares = {stage: {"supcon": grown, "sincere": [0.0] * 5} for stage in repulsion.STAGES}
    pushes = {"before": [0.0] * 5, "after": [0.0, 0.2, 0.3, 0.4, 0.5]}
    repelled = {
        f"t0.1_seed{seed}": {"temperature": 0.1, "shares": shares, "pushes": pushes} for seed in (0, 1)
    }
    shown = repulsion.tables(repelled)
    assert "| after | supcon | 0.1 | 0.0 [0.0, 0.0] | 50.0 [50.0, 50.0] |" in shown
    assert "| after | supcon | 0.1 | 0.0 [0.0, 0.0] | 20.0 [20.0, 20.0] |" in shown
    assert [claim.verdict for claim in repulsion.claims(repelled)] == ["shown", "shown"]
    falling = {stage: {"supcon": [0.0, 0.6, 0.5, 0.4, 0.3], "sincere": [0.0] * 5} for stage in shares}
    fallen = {name: record | {"shares": falling} for name, record in repelled.items()}
    assert repulsion.claims(fallen)[0].verdict == "contradicted"

    rows = [{"truth": truth, "negatives": 8, "bounds": dict.fromkeys(kl_bound.CRITICS, bound)}
            for truth, bound in ((2.0, 2.9), (32.0, 2.07))]  # fmt: skip
    over = {"dim": 3, "rows": rows}
    bounded = {"d3_seed0": over, "d3_seed1": over}
    assert [claim.verdict for claim in kl_bound.claims(bounded)] == ["contradicted", "contradicted", "shown"]

    for study, known in ((threshold, records), (repulsion, repelled), (kl_bound, bounded)):
        assert study.tables({}) == ""
        assert [*study.claims({}), *study.draw({}, tmp_path)] == []
        for name in study.draw(known, tmp_path):
            assert (tmp_path / name).stat().st_size > 1000
