"""Operators with weights of candidates, and the mean of the negatives, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.gradients import added
from helpers.weighted_pairs import EPSILON, FORMS, Dense, check, compare, draw
from torch import Tensor

from pysupcon.pairs import ops, tiled
from pysupcon.pairs.autograd import row_statistics
from pysupcon.pairs.ops import zero_gradients
from pysupcon.pairs.statistics import Pairing, Plan

OPERATORS: dict[str, Any] = {"cpu": ops, "tiled": tiled}
TEMPERATURES = [0.005, 0.07, 10.0]
"""running maxima; one reference, unless the weights differ much; flat"""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["equal", "near", "far"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
def test_operators_equal_the_definition(
    form: str, weights: str, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    check(draw(form, dtype, temperature, weights, seed=3), OPERATORS[backend])


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("weights", [None, "near", "far"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
def test_mean_of_the_negatives(
    form: str, weights: str | None, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    """It is the gradient of n, and the statistics stay the same up to rounding."""
    case = draw(form, dtype, temperature, weights or "near", seed=4)._replace(log_weights=None)
    if weights is None:
        case = case._replace(candidate_log_weights=torch.zeros(len(case.candidate_labels)))
    dense = Dense.of(case)
    zeros, ones = torch.zeros(2, len(case.x), dtype=torch.float64).add_(torch.tensor([[0.0], [1.0]]))
    shares = dense.gradient(*dense.statistics()[:2], ones, zeros, zeros, zeros)
    mean = zero_gradients(case.x)
    pairs = (*case.pairs[:-2], None, None) if weights is None else case.pairs
    found = OPERATORS[backend].pair_stats(*pairs, True, True, mean)
    candidates = case.candidates.double()
    reach = 1 + 1 / temperature + (140 if weights == "far" else 5)
    slack = 16 * EPSILON[dtype] * reach
    compare(mean, shares @ candidates, slack * (shares.abs() @ candidates.abs()))
    for value, other in zip(found, OPERATORS[backend].pair_stats(*pairs, True, True), strict=True):
        compare(value, other, slack * (1 + dense.positive.sum(1)))


def test_mean_of_no_negatives_is_zero(backend: str) -> None:
    case = draw("candidates", torch.float32, 0.1, "near", seed=5)
    for unlike, negatives in ((case._replace(labels=torch.zeros(100, dtype=torch.int64),
                                             candidate_labels=torch.zeros(200, dtype=torch.int64)), True),
                              (case, False)):  # fmt: skip
        mean = zero_gradients(unlike.x)
        n = OPERATORS[backend].pair_stats(*unlike.pairs, negatives, True, mean)[0]
        assert (n == -torch.inf).all()
        assert not mean.any()


def test_mean_of_the_negatives_needs_candidates(backend: str) -> None:
    case = draw("self", torch.float32, 0.1, "near", seed=5)
    with pytest.raises(ValueError, match="negative_mean goes with candidates"):
        OPERATORS[backend].pair_stats(*case.pairs, True, True, zero_gradients(case.x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_candidates_of_weight_zero(form: str, temperature: float, backend: str) -> None:
    """If no candidate has a weight, n and p are -inf and every gradient is finite."""
    case = draw(form, torch.float32, temperature, "near", seed=6)
    nothing = [None if weight is None else torch.full_like(weight, -torch.inf) for weight in case.weights]
    operators = OPERATORS[backend]
    forward = (None if form == "own rows" else nothing[0]), nothing[1]
    rows, instances = case.rows, (case.instances, case.candidate_instances)
    n, p, *sums = operators.pair_stats(*rows, *instances, *forward, True, True)
    assert (torch.stack([n, p]) == -torch.inf).all()
    assert torch.stack(sums).isfinite().all()
    ones = torch.ones_like(n)
    columns: tuple[Any, ...] = (None,) * 6
    if form == "own rows":
        others = torch.ones(len(case.candidate_labels))
        columns = 40 + others, 40 + others, *(others,) * 4
    own = n, p, ones, ones, None, None
    grads = added(
        operators.pair_stats_backward, *rows, *instances, *nothing, *own, *columns[:4],
        *(None, None), True, True, candidates=form in ("candidates", "self index"),
    )[:2]  # fmt: skip
    for grad in grads:
        assert grad is None or not grad.any()
    assert operators.positive_softplus(*rows, *forward, n, 0.25).isfinite().all()
    found = added(
        operators.positive_softplus_backward, *rows, *nothing, n, 0.25, ones, columns[0], columns[2],
    )  # fmt: skip
    assert all(value is None or value.isfinite().all() for value in found)


@pytest.mark.parametrize("form", FORMS[:3])
def test_equal_weights_shift_the_logsumexps(form: str, backend: str) -> None:
    """The weight w of all candidates adds log w to n and p. Gradients stay the same."""
    case = draw(form, torch.float32, 0.05, "near", seed=7)
    operators, ones = OPERATORS[backend], torch.ones(len(case.x), dtype=torch.float64)
    found = []
    for weight in (None, 1e-30, 7.0, 1e30):
        columns = [
            None if column is None or weight is None else torch.full_like(column, weight).log()
            for column in case.weights
        ]
        pairs = *case.pairs[:-2], *columns
        stats = operators.pair_stats(*pairs, True, True)
        grads = added(
            operators.pair_stats_backward, *pairs, *stats[:2], ones, ones, ones, ones, *(None,) * 6, True,
            True, candidates=form != "self",
        )[:2]  # fmt: skip
        found.append((stats, grads))
    (plain, plain_grads), *others = found
    for weight, (stats, grads) in zip((1e-30, 7.0, 1e30), others, strict=True):
        shift = torch.tensor(weight, dtype=torch.float64).log()
        for value, right in zip(stats, (plain[0] + shift, plain[1] + shift, *plain[2:]), strict=True):
            torch.testing.assert_close(value, right, rtol=0, atol=3e-6)
        for grad, right in zip(grads, plain_grads, strict=True):
            if right is not None:
                assert (grad - right).norm() <= 2e-6 * right.norm()


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_sets_of_blocks(temperature: float) -> None:
    """Many blocks: the same bits for any number of threads, and the results of the tiled operators."""
    count = 1100
    generator = torch.Generator().manual_seed(count)
    x = torch.nn.functional.normalize(torch.randn(count, 70, generator=generator, dtype=torch.float64))
    labels = torch.randint(0, 40, (count,), generator=generator)
    log_weights, u, v, w, g = torch.randn(5, count, generator=generator, dtype=torch.float64)
    rows = (x, labels, torch.argsort(labels, stable=True), torch.tensor(1 / temperature, dtype=torch.float64))
    weighted = *rows, *(None,) * 6, log_weights, None
    memory = *rows, x[:500], labels[:500], torch.argsort(labels[:500], stable=True), *(None,) * 4

    def results(operators: Any) -> list[Tensor]:
        n, p, *sums = operators.pair_stats(*weighted, True, True)
        mean = torch.zeros_like(x)
        of_memory = operators.pair_stats(*memory, log_weights[:500], True, True, mean)
        upstream = u, v, w, None, *(None,) * 6, True, True
        grad = added(operators.pair_stats_backward, *weighted, n, p, *upstream)[0]
        rows = *weighted[:8], log_weights, None
        total = operators.positive_softplus(*rows, n, 0.25)
        softplus = added(operators.positive_softplus_backward, *rows, n, 0.25, g, None, None)
        return [n, p, *sums, mean, *of_memory, grad, total, softplus[0], softplus[2]]

    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(ops))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    torch.testing.assert_close(found[0], results(tiled), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("epsilon", [None, 0.25])
@pytest.mark.parametrize("form", FORMS[:3])
def test_gradcheck(form: str, epsilon: float | None, backend: str) -> None:
    case = draw(form, torch.float64, 0.5, "near", seed=8, total=10, width=3)
    rows = case.rows
    pairing = Pairing(rows[1], rows[2], *rows[5:], *case.pairs[8:])
    plan = Plan(backend, pairing, epsilon=epsilon)
    used = case.labels != -1

    def function(x: Tensor, candidates: Tensor | None, scale: Tensor) -> tuple[Tensor, ...]:
        n, p, *sums = row_statistics(x, candidates, scale, None, plan)
        finite = (torch.where((value > -torch.inf) & used, value, 0.0) for value in (n, p))
        return *finite, *(value for value in sums if value.shape == n.shape)

    leaves = [
        None if value is None else value.clone().requires_grad_()
        for value in (case.x, case.candidates, case.scale)
    ]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e15])
def test_log_weights_are_checked(value: float, backend: str) -> None:
    for form, name, place in (("self", "log_weights", -2), ("candidates", "candidate_log_weights", -1)):
        pairs = list(draw(form, torch.float32, 0.1, "near", seed=9).pairs)
        pairs[place] = pairs[place].clone()
        pairs[place][3] = value
        with pytest.raises(ValueError, match=rf"{name} must lie between -1e14 and 1e14 or be -inf, got"):
            OPERATORS[backend].pair_stats(*pairs, True, True)


def test_weights_belong_to_the_candidates(backend: str) -> None:
    operators = OPERATORS[backend]
    own, other = (draw(form, torch.float32, 0.1, "near", seed=9) for form in ("self", "candidates"))
    with pytest.raises(ValueError, match="candidate_log_weights go with candidates"):
        operators.pair_stats(*own.pairs[:-2], None, own.log_weights, True, True)
    with pytest.raises(ValueError, match="log_weights go with the candidates' own statistics"):
        operators.pair_stats(*other.pairs[:-2], torch.zeros(len(other.x)), None, True, True)
