"""Batches whose views nearly agree: a loss is a small difference of large terms and must stay accurate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import LOSSES, NEEDS_INSTANCES, NEGATIVE
from helpers.gradients import added

import pysupcon
from benchmarks.kernels import converged
from pysupcon import functional
from pysupcon.pairs import ops, tiled

BACKENDS = ["tiled", *(["cpu"] if pysupcon.backends()["cpu"]["available"] else [])]


@pytest.mark.parametrize("views", converged.VIEWS)
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.5])
@pytest.mark.parametrize("batch", ["converged", "random"])
@pytest.mark.parametrize("name", ["supcon", "cnce"])
def test_errors_are_at_most_twice_those_of_a_dense_loss(
    name: str, batch: str, temperature: float, views: int
) -> None:
    """The tolerance of ``benchmarks/kernels/converged.py``, which runs more cases and seeds."""
    case = converged.Case(batch, temperature, views)
    _, found = converged.errors(name, case, BACKENDS, seeds=1)
    assert not converged.exceeded(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", converged.LOSSES)
def test_every_loss_and_temperature(name: str) -> None:
    for case in converged.cases():
        _, found = converged.errors(name, case, BACKENDS)
        assert not converged.exceeded(found), case


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NEGATIVE])
def test_no_loss_is_negative(name: str, dtype: torch.dtype, temperature: float, backend: str) -> None:
    """Equal views, in classes of one and of two samples: the true loss is far below a rounding of s."""
    generator = torch.Generator().manual_seed(0)
    for copies, same in ((2, 1), (3, 2)):
        x = F.normalize(torch.randn(16, 1, 32, generator=generator), dim=-1).repeat(1, copies, 1).to(dtype)
        labels = torch.arange(16) // same
        options = {"temperature": temperature, "reduction": "none", "backend": backend}
        assert (LOSSES[name](x, labels, **options) >= 0).all()
        if name in NEEDS_INSTANCES:
            flat, instances = x.flatten(0, 1), torch.arange(16).repeat_interleave(copies)
            flat_labels = labels.repeat_interleave(copies)
            assert (LOSSES[name](flat, flat_labels, instances=instances, **options) >= 0).all()


@pytest.mark.parametrize("rows", [64, 700])
def test_one_positive_and_no_negative_is_exactly_zero(rows: int, backend: str) -> None:
    """p and the mean both equal the single similarity."""
    x = torch.randn(rows, 2, 24)
    statistics = functional.pair_statistics(x, temperature=0.07, backend=backend)
    gap = statistics.positive_logsumexp - statistics.positive_mean
    assert gap.abs().max() <= 4e-15  # of p, which is about 20, in float64: from logarithms to base 2 and back
    pair = functional.supcon(x[:1], temperature=1e-3, backend=backend)
    assert pair == 0


def test_the_loss_of_equal_rows_is_the_logarithm_of_their_number(backend: str) -> None:
    """log(N - 1), whatever the similarity, to the rounding of the loss itself."""
    for count in (2, 3, 50, 600):
        x = F.normalize(torch.randn(1, 20), dim=1).repeat(count, 1)
        for temperature in (0.01, 0.05, 0.3):
            loss = functional.supcon(
                x, torch.zeros(count, dtype=torch.int64), temperature=temperature, backend=backend
            )
            assert loss.item() == pytest.approx(math.log(count - 1), rel=2e-7, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("views", [2, 8])
def test_processes_keep_the_digits(views: int, temperature: float, backend: str) -> None:
    """Each of two processes contrasts its rows with all rows, which gives the same numbers. The tolerance is
    that of one process."""
    operators = tiled if backend == "tiled" else ops
    case = converged.Case("converged", temperature, views)
    features, labels = converged.rows(case, seed=0)
    x, y = features.flatten(0, 1), labels.repeat_interleave(views)
    scale, order = torch.tensor(1 / temperature, dtype=torch.float64), torch.argsort(y, stable=True)
    candidates = x, y, order, torch.arange(len(x))
    n, p, positive_sum, _ = operators.pair_stats(x, y, order, scale, *candidates, *(None,) * 4, True, True)
    count = (y[:, None] == y).sum(1) - 1
    leaves = [column.requires_grad_() for column in (n, p, positive_sum)]
    loss = (torch.logaddexp(n, p) - positive_sum / count).mean()
    upstream = torch.autograd.grad(loss, leaves)
    stats = (n.detach(), p.detach(), *upstream, None)
    found = []
    for half in torch.arange(len(x)).chunk(2):
        own_order = torch.argsort(y[half], stable=True)
        mine = [None if column is None else column[half] for column in stats]
        rows = (x[half], y[half], own_order, scale, x, y, order, half, *(None,) * 4)
        found.append(added(operators.pair_stats_backward, *rows, *mine, *stats, True, True)[0])
    _, right_gradient = converged.loss_and_gradient(
        functional.supcon, features.double(), labels, temperature=temperature, backend="reference"
    )
    _, dense = converged.loss_and_gradient(
        functional.supcon, features, labels, temperature=temperature, backend="reference"
    )
    gradient = torch.cat(found).double()
    tangent = gradient - (gradient * x.double()).sum(1, keepdim=True) * x.double()
    error = (tangent - right_gradient.flatten(0, 1)).norm()
    size = 1 / temperature / len(x) ** 0.5
    assert error / size <= converged.ALLOWED * (dense - right_gradient).norm() / size + converged.SLACK
