"""The temperature of a module: assignment, schedules, and the limits of a learnable one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.cases import CASES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import pysupcon
from pysupcon.contrastive import ContrastiveLoss

NAMES = [name for name, (_, own) in CASES.items() if not own]
LIMITS = {"min_temperature": 0.05, "max_temperature": 0.5}


def _loss(name: str, temperature: float = 0.2, **options: Any) -> ContrastiveLoss:
    loss = CASES[name][0](temperature, **options).double()
    loss.temperature = temperature  # in float64
    return loss


def _value(loss: ContrastiveLoss) -> float:
    with torch.no_grad():
        return float(loss.temperature)


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_assigned_temperature(name: str, learnable: bool) -> None:
    loss, batch = _loss(name, learnable_temperature=learnable), _batch()
    parameter = loss.log_temperature
    loss.temperature = 0.35
    assert _value(loss) == pytest.approx(0.35, rel=1e-15)
    torch.testing.assert_close(loss(*batch), _loss(name, 0.35)(*batch))
    assert loss.log_temperature is parameter
    loss.temperature = torch.tensor(0.5)  # as in the constructor
    assert _value(loss) == 0.5


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", ["supcon", "sincere"])
def test_a_schedule_needs_no_graph_for_each_value(name: str, learnable: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss, batch = _loss(name, learnable_temperature=learnable), _batch()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for temperature in (0.1, 0.25, 1.0, 2, 0.4):
        loss.temperature = temperature
        torch.testing.assert_close(compiled(*batch), _loss(name, temperature)(*batch))
    assert counter.frame_count <= (1 if learnable else 2)  # the first value, any other value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "temperature must be from 1e-12 to 1e.12, got 0.0"),
        (math.nan, ValueError, "temperature must be from 1e-12 to 1e.12, got nan"),
        ("0.1", TypeError, "temperature must be a number or a tensor of one element, got str '0.1'"),
        (torch.ones((), requires_grad=True), TypeError, "temperature is not differentiable"),
    ],
)
@pytest.mark.parametrize("learnable", [False, True])
def test_a_temperature_that_is_refused(
    value: Any, error: type[Exception], message: str, learnable: bool
) -> None:
    loss = pysupcon.SupConLoss(0.2, learnable_temperature=learnable)
    with pytest.raises(error, match=message):
        loss.temperature = value
    assert _value(loss) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_temperature": 0.1}, "min_temperature needs learnable_temperature=True"),
        ({"max_temperature": 0.1}, "max_temperature needs learnable_temperature=True"),
        ({"learnable_temperature": True, "min_temperature": 0.0}, "min_temperature must be from 1e-12"),
        (
            {"learnable_temperature": True, "max_temperature": 0.1},
            "temperature must be from 1e-12 to 0.1, got",
        ),
        (
            {"learnable_temperature": True, "min_temperature": 0.3},
            "temperature must be from 0.3 to 1e.12, got",
        ),
        (
            {"learnable_temperature": True, "min_temperature": 0.3, "max_temperature": 0.1},
            "min_temperature must be at most max_temperature, got 0.3 and 0.1",
        ),
    ],
)
def test_limits_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pysupcon.SupConLoss(0.2, **options)


def test_an_assignment_beyond_the_limits_is_refused() -> None:
    loss = pysupcon.SupConLoss(0.2, learnable_temperature=True, **LIMITS)
    with pytest.raises(ValueError, match=r"temperature must be from 0.05 to 0.5, got 0.6"):
        loss.temperature = 0.6
    loss.temperature = 0.5
    assert "temperature=0.5 (learnable), min_temperature=0.05, max_temperature=0.5" in repr(loss)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("beyond", "limit"), [(0.01, 0.05), (3.0, 0.5)])
@pytest.mark.parametrize("name", ["supcon", "cnce"])
def test_beyond_a_limit_loss_and_gradient_are_those_of_the_limit(
    name: str, beyond: float, limit: float, compiled: bool
) -> None:
    torch._dynamo.reset()
    batch = _batch()
    loss = _loss(name, learnable_temperature=True, **LIMITS)
    free = _loss(name, limit, learnable_temperature=True)
    assert loss.log_temperature is not None
    assert free.log_temperature is not None
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(beyond))
    assert _value(loss) == pytest.approx(limit, rel=1e-15)
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value = call(*batch) + call(
        batch[0].flip(0), *batch[1:]
    )  # the second call keeps the first one's backward
    value.backward()
    expected = free(*batch) + free(batch[0].flip(0), *batch[1:])
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss.log_temperature.grad, free.log_temperature.grad, rtol=1e-13, atol=1e-13)
    assert loss.log_temperature.item() == pytest.approx(math.log(limit), rel=1e-15)


def test_a_temperature_leaves_its_limit() -> None:
    """It does not drift beyond the limit while the gradient points outward."""
    loss = pysupcon.SupConLoss(0.2, learnable_temperature=True, normalize=True, **LIMITS)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    features, labels = torch.randn(30, 8), torch.arange(30) % 3
    found = []
    for step in range(40):
        optimizer.zero_grad()
        outward = step < 30
        (loss(features, labels) if outward else -loss(features, labels)).backward()
        optimizer.step()
        found.append(_value(loss))
    assert found[29] == pytest.approx(0.5)
    assert found[30] < 0.499
    assert found[39] < found[30]


def test_limits_are_not_in_the_state() -> None:
    old = pysupcon.SupConLoss(0.1, learnable_temperature=True)
    new = pysupcon.SupConLoss(0.1, learnable_temperature=True, **LIMITS)
    assert old.state_dict().keys() == new.state_dict().keys() == {"log_temperature"}
    assert not pysupcon.SupConLoss(0.1).state_dict()
    old.temperature = 2.0
    new.load_state_dict(old.state_dict(), strict=True)
    assert _value(new) == pytest.approx(0.5)
    assert _value(copy.deepcopy(new)) == pytest.approx(0.5)


def test_limits_without_writing_to_the_parameter() -> None:
    """In torch.func, in an evaluation and in torch.export the parameter is not changed."""
    loss, batch = _loss("supcon", learnable_temperature=True, **LIMITS), _batch()
    given = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    expected = _loss("supcon", 0.5)(*batch)
    torch.testing.assert_close(functional_call(loss, {"log_temperature": given}, batch), expected)
    gradient = torch.func.grad(lambda t: functional_call(loss, {"log_temperature": t}, batch))
    assert gradient(given.detach()) != 0
    assert loss.log_temperature is not None
    with torch.no_grad():
        loss.log_temperature.fill_(1.0)
        torch.testing.assert_close(loss(*batch), expected.detach())
    exported = torch.export.export(loss, (batch[0].detach(), batch[1]))
    torch.testing.assert_close(exported.module()(batch[0].detach(), batch[1]), expected.detach())
    assert loss.log_temperature.item() == 1.0
