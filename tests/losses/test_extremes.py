"""Temperatures, rows and epsilons of every size: a result is correct, or the call raises an error.

The size of a problem is S_i = |x_i| max|x_j| / temperature. In any implementation, the rounding
error of its similarities is eps * S_i, and so is that of loss and gradient (see
``benchmarks/kernels/tolerances.py``).
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from helpers.exact import exact
from helpers.tolerances import TABLE, parts
from torch import Tensor

from pysupcon import functional
from pysupcon.pairs.checks import TEMPERATURE_RANGE

_LARGEST_S = {torch.float32: 1e7, torch.float64: 5e14}
"""Largest S for which every backend must return a result. eps * S is about 1 there: beyond it the absolute
error of a similarity is above 1."""
_KINDS: dict[str, tuple[dict[str, float], str, dict[str, Any]]] = {
    "supcon": ({"supcon": 1.0}, "supcon", {}),
    "sincere": ({"sincere": 1.0}, "sincere", {}),
    "epsilon": ({"sincere": 1.0}, "sincere", {"epsilon": None}),
    "cnce": ({"cnce": 1.0}, "class_conditional_info_nce", {}),
    "spread": ({"supcon": 0.75, "cnce": 0.25}, "spread", {"alpha": 0.25}),
    "spread_sincere": ({"sincere": 0.75, "cnce": 0.25}, "spread", {"alpha": 0.25, "base": "sincere"}),
}


class Case(NamedTuple):
    """One call."""

    parts: dict[str, float]
    loss: str
    options: dict[str, Any]
    x: Tensor
    labels: Tensor
    instances: Tensor
    temperature: float

    @property
    def sizes(self) -> Tensor:
        norm = self.x.double().norm(dim=1)
        return norm * norm.max() / self.temperature


def _draw(kind: str, dtype: torch.dtype, seed: int, low: float, high: float) -> Case:
    """``low``, ``high``: logarithms of the smallest and largest size."""
    parts, loss, options = _KINDS[kind]
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, width = draw.choice([(2, 3), (5, 3), (7, 4)])
    exponents = [math.log10(bound) for bound in TEMPERATURE_RANGE]
    temperature = 10 ** (draw.uniform(-8, 8) if draw.random() < 0.8 else draw.uniform(*exponents))
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if draw.random() < 0.3:  # rows of every size; the largest decides
        x *= torch.tensor([[10 ** draw.uniform(-30, 0)] for _ in range(rows)], dtype=torch.float64)
    size = 10 ** draw.uniform(low, high)
    x = (x * (math.sqrt(size * temperature) / x.norm(dim=1).max())).to(dtype)
    labels = torch.tensor([draw.randrange(draw.choice([1, 2, 3])) for _ in range(rows)])
    instances = 2 * labels + torch.tensor([draw.randrange(2) for _ in range(rows)])
    if "epsilon" in options:
        options = {"epsilon": draw.choice([-1, 1]) * 10 ** draw.uniform(-2, 4)}
    return Case(parts, loss, options, x, labels, instances, temperature)


def _call(case: Case, backend: str, mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each anchor, and the gradient of their sum by the rows and by the temperature."""
    x = case.x.clone().requires_grad_()
    temperature = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
    positives: dict[str, Any] = {"labels": case.labels}
    if mask:
        positives = {"mask": case.labels[:, None] == case.labels}
    loss = getattr(functional, case.loss)(
        x,
        **positives,
        instances=case.instances,
        temperature=temperature,
        reduction="none",
        backend=backend,
        **case.options,
    )
    grads = torch.autograd.grad(loss.sum(), (x, temperature))
    return loss.detach().double(), *grads


def _wrong(case: Case, backend: str, mask: bool = False) -> str | None:
    """Describes the error of a wrong result; None for a correct one.

    Raises:
        ValueError: the call raised it.
    """
    loss, grad, slope = _call(case, backend, mask)
    epsilon = case.options.get("epsilon", 0.0)
    truth = exact(case.parts, case.x, case.labels, case.instances, case.temperature, epsilon)
    tolerance = TABLE[case.x.dtype]
    error = (loss - truth.loss).abs()
    allowed = tolerance.loss * truth.loss.abs() + 4 * tolerance.eps * (1 + case.sizes + abs(epsilon))
    if not (error <= allowed).all():
        return f"loss {loss.tolist()} for {truth.loss.tolist()}"
    # Beyond eps * S = 1 a weight can be any number in [0, 1], and a gradient any sum of the parts.
    relative = min(4 * tolerance.eps * (1 + case.sizes.max().item() + abs(epsilon)), 2.0)
    pull = case.x.double().norm(dim=1).max().item() / case.temperature
    bound = tolerance.gradient * truth.grad.norm().item() + relative * parts(pull, len(case.x))
    bound += torch.finfo(case.x.dtype).tiny * math.sqrt(case.x.numel())
    if not (off := (grad.double() - truth.grad).norm().item()) <= bound:
        return f"gradient off by {off:.3g}, {bound:.3g} allowed, norm {truth.grad.norm():.3g}"
    bound = tolerance.gradient * abs(truth.slope) + relative * 4 * case.sizes.sum().item() / case.temperature
    if not (off := abs(slope.item() - truth.slope)) <= bound:
        return f"temperature's gradient {slope.item():.6g} for {truth.slope:.6g}"
    return None


def _said(case: Case, problem: str) -> str:
    return (
        f"{case.loss} {case.options} temperature {case.temperature:.3g}, S {case.sizes.max():.3g}, "
        f"x {case.x.tolist()}, labels {case.labels.tolist()}: {problem}"
    )


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 600), marks=pytest.mark.slow)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", _KINDS)
def test_up_to_the_largest_s_every_result_is_correct(
    kind: str, dtype: torch.dtype, seeds: range, backend: str
) -> None:
    for seed in seeds:
        case = _draw(kind, dtype, seed, -40, math.log10(_LARGEST_S[dtype]))
        problem = _wrong(case, backend, mask=backend == "tiled" and seed % 4 == 0)
        assert problem is None, _said(case, problem)


@pytest.mark.filterwarnings("ignore:no anchor of this batch has a positive")
@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 600), marks=pytest.mark.slow)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", _KINDS)
def test_beyond_the_largest_s_a_result_is_correct_or_an_error(
    kind: str, dtype: torch.dtype, seeds: range, backend: str
) -> None:
    for seed in seeds:
        case = _draw(kind, dtype, seed, math.log10(_LARGEST_S[dtype]), 50)
        try:
            problem = _wrong(case, backend, mask=backend == "tiled" and seed % 4 == 0)
        except ValueError:
            continue
        assert problem is None, _said(case, problem)


@pytest.mark.parametrize(
    ("name", "backend", "dtype", "size"),
    [
        ("sincere", "cpu", torch.float32, 1e10),
        ("sincere", "cpu", torch.float64, 1e10),
        ("sincere", "tiled", torch.float32, 1e10),
        ("supcon", "cpu", torch.float32, 1e20),
        ("supcon", "tiled", torch.float32, 1e20),
    ],
)
def test_a_single_class_of_opposite_rows(name: str, backend: str, dtype: torch.dtype, size: float) -> None:
    """Without negatives and with one positive the loss is 0, whatever the distance."""
    x = torch.tensor([[size], [-size]], dtype=dtype)
    try:
        loss = getattr(functional, name)(x, torch.tensor([0, 0]), temperature=1e-12, backend=backend)
    except ValueError:
        return
    assert loss == 0


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "seed"),
    [
        ("tiled", torch.float32, 1e5, 1),  # S = 1e11
        ("tiled", torch.float64, 1e9, 0),  # S = 1e19
        ("cpu", torch.float64, 1e9, 0),
        ("cpu", torch.float32, 1e5, 1),
        ("cpu", torch.float64, 1e5, 1),
    ],
)
def test_a_gradient_is_bounded_by_its_parts(backend: str, dtype: torch.dtype, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(6, 3, dtype=dtype) * size).requires_grad_()
    try:
        loss = functional.supcon(x, torch.arange(6) % 2, temperature=0.3, backend=backend)
    except ValueError:
        return
    (grad,) = torch.autograd.grad(loss, x)
    # Each anchor's part of the mean, 1 / 6, pulls with at most 2 max|x| / temperature, and is pulled at.
    assert grad.norm() <= parts(x.detach().norm(dim=1).max().item() / 0.3, 6) / 6


@pytest.mark.parametrize("value", [1.001 * TEMPERATURE_RANGE[0], 1e-6, 1e6, 0.999 * TEMPERATURE_RANGE[1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_of_the_temperature_are_correct(value: float, dtype: torch.dtype, backend: str) -> None:
    """Rows that make S = 10, and a learnable temperature in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    x = (x * (math.sqrt(10 * value) / x.norm(dim=1).max())).to(dtype)
    labels = torch.arange(6) % 2
    temperature = torch.tensor([value], dtype=torch.float32, requires_grad=True)
    loss = functional.supcon(x, labels, temperature=temperature, reduction="sum", backend=backend)
    loss.backward()
    truth = exact({"supcon": 1.0}, x, labels, torch.arange(6), temperature.item(), 0.0)
    assert loss.item() == pytest.approx(truth.loss.sum().item(), rel=1e-5)
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx(truth.slope, rel=1e-5)
