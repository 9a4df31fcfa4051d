"""Raw operators with wrong arguments: a ValueError names the argument, nothing is written, and no memory is
read out of bounds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import raw_operators
from helpers.raw_operators import DTYPES, FORMS, Fault, Values, applied, draw, operators

import pysupcon
from pysupcon.pairs import tiled

CPU = pysupcon.backends()["cpu"]
needs_extension = pytest.mark.skipif(not CPU["available"], reason=CPU["detail"])
NAMES = list(operators("pysupcon"))
FAULTS = [*raw_operators.FAULTS, *raw_operators.WEIGHT_FAULTS]
# Accepted by the pure-PyTorch operators, which copy rows and add to a gradient once.
HARMLESS_IN_TILED = ("strided", "memory", "NaN")


def _problems(form: str) -> list[Values]:
    dice = random.Random(form)
    return [draw(dice, form, dtype, weights=weights) for weights in (False, True) for dtype in DTYPES]


def _call(backend: str, name: str, values: Values) -> Any:
    if backend == "cpu":
        return raw_operators.call("pysupcon", name, values)
    return getattr(tiled, name)(*(values.get(argument) for argument in operators("pysupcon")[name]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_valid_arguments_are_accepted(name: str, form: str, backend: str) -> None:
    for values in _problems(form):
        _call(backend, name, values)


@needs_extension
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_refused_by_name(fault: Fault) -> None:
    tried = 0
    for form in FORMS:
        for values in _problems(form):
            for name in NAMES:
                wrong = applied(fault, operators("pysupcon")[name], values)
                if wrong is None:
                    continue
                before = {key: value.clone() for key, value in wrong.items() if torch.is_tensor(value)}
                with pytest.raises(ValueError, match=fault.message):
                    raw_operators.call("pysupcon", name, wrong)
                for key, value in before.items():
                    torch.testing.assert_close(wrong[key], value, rtol=0, atol=0, equal_nan=True)
                tried += 1
    assert tried


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_tiled_operators_refuse_faults(fault: Fault) -> None:
    if fault.name.endswith(HARMLESS_IN_TILED):
        pytest.skip("the result is right, or not a number")
    for form in FORMS:
        for values in _problems(form):
            for name in set(NAMES):
                wrong = applied(fault, operators("pysupcon")[name], values)
                if wrong is not None:
                    with pytest.raises((ValueError, RuntimeError)):
                        _call("tiled", name, wrong)


@needs_extension
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_backward")])
def test_statistics_of_the_candidates_come_together_and_alone(name: str) -> None:
    taken = operators("pysupcon")[name]
    values = draw(random.Random(1), "own rows", torch.float32)
    for argument in taken:
        if argument.startswith(("candidate_grad", "candidate_n", "candidate_p")):
            others = [a for a in taken if a.startswith(("candidate_grad", "candidate_n", "candidate_p"))]
            if len(others) > 1:
                with pytest.raises(ValueError, match="come together"):
                    raw_operators.call("pysupcon", name, {**values, argument: None})
    with pytest.raises(ValueError, match="need self_index"):
        raw_operators.call("pysupcon", name, {**values, "self_index": None})
    both = {**values, "grad_candidates": torch.zeros_like(values["candidates"])}
    with pytest.raises(ValueError, match="is their owner's"):
        raw_operators.call("pysupcon", name, both)


@needs_extension
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_backward")])
def test_gradients_share_no_memory(name: str) -> None:
    values = draw(random.Random(5), "candidates", torch.float64)
    rows, candidates = values["x"], values["candidates"]
    assert rows.numel()
    assert candidates.numel()
    memory = torch.zeros(rows.numel() + candidates.numel(), dtype=torch.float64)
    first = memory[: rows.numel()].view(rows.shape)
    for start, message in ((rows.numel(), None), (rows.numel() - 1, "grad_candidates must not share memory")):
        second = memory[start : start + candidates.numel()].view(candidates.shape)
        wrong = {**values, "grad_x": first, "grad_candidates": second}
        if message is None:
            raw_operators.call("pysupcon", name, wrong)
        else:
            with pytest.raises(ValueError, match=message):
                raw_operators.call("pysupcon", name, wrong)
    upstream = "grad_n" if "grad_n" in operators("pysupcon")[name] else "grad_total"
    shared = {**values, "grad_x": first, "grad_candidates": None, upstream: memory[: len(rows)]}
    with pytest.raises(ValueError, match="grad_x must not share memory"):
        raw_operators.call("pysupcon", name, shared)


@needs_extension
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_backward")])
def test_a_gradient_gets_a_new_version(name: str) -> None:
    values = draw(random.Random(2), "candidates", torch.float32)
    values["grad_candidates"] = torch.zeros_like(values["candidates"])
    weight = torch.ones((), requires_grad=True)
    for argument in ("grad_x", "grad_candidates"):
        product = (weight * values[argument]).sum()
        raw_operators.call("pysupcon", name, values)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        raw_operators.call("pysupcon", name, draw(random.Random(2), "candidates", torch.float32))


@needs_extension
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argument", ["labels", "x", "scale"])
def test_tensors_of_the_meta_device_are_refused(name: str, argument: str) -> None:
    values = draw(random.Random(3), "self", torch.float32)
    values[argument] = values[argument].to("meta")
    with pytest.raises(ValueError, match="all tensors must be on x's device"):
        raw_operators.call("pysupcon", name, values)


@needs_extension
def test_negated_and_zero_tensors_are_supported() -> None:
    """Tensors whose memory does not contain their values."""
    values = draw(random.Random(4), "self", torch.float64)
    negated = torch._neg_view(-values["x"].clone())
    for name in NAMES:
        if not name.endswith("_backward"):
            want = raw_operators.call("pysupcon", name, values)
            got = raw_operators.call("pysupcon", name, {**values, "x": negated})
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@needs_extension
@pytest.mark.parametrize(
    ("ids", "views", "message"),
    [
        (torch.zeros(3, 2).long(), 1, r"ids must be int64 of shape \[6\] on cpu, got Long of shape \[3, 2\]"),
        (torch.zeros(3).int(), 1, r"ids must be int64 of shape \[3\] on cpu, got Int"),
        (torch.zeros(()).long(), 1, "ids must be int64"),
        (torch.zeros(3).long(), 0, "views must be at least 1 .* at most 2147483646, got 3 times 0"),
        (torch.zeros(3).long(), -(2**63), "views must be at least 1"),
        (torch.zeros(3).long(), 2**62, "views must be at least 1 and ids times views at most"),
        (torch.zeros(3).long(), 2**31 // 3 + 1, "views must be at least 1 and ids times views at most"),
        (torch.zeros(0).long(), 2**62, "views must be at least 1 and ids times views at most"),
    ],
)  # fmt: skip
def test_order_by_class_is_checked(ids: torch.Tensor, views: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.pysupcon.order_by_class(ids, views)


@needs_extension
def test_too_many_rows_are_refused_before_they_are_read() -> None:
    many = 2**31
    values = draw(random.Random(6), "candidates", torch.float32)
    values["candidates"] = values["candidates"][:1].expand(many, -1)
    values["candidate_labels"] = values["candidate_order"] = torch.zeros(1).long().expand(many)
    for name in NAMES:
        with pytest.raises(ValueError, match="candidates must have at most 2147483646 rows, got 2147483648"):
            raw_operators.call("pysupcon", name, values)
