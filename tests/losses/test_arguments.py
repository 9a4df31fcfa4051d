"""Argument types other than Python numbers and int64 labels: accepted, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import LOSSES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pysupcon
from pysupcon import compat, functional

X = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
ROWS = X.flatten(0, 1)
Y = torch.tensor([0, 1, 0, 2, 1, 0])
ROW_LABELS = Y.repeat_interleave(2)

# 0.25 in floating-point dtypes, 1 in integer dtypes.
NUMBERS: dict[str, Any] = {
    "int": 1,
    "numpy float64": np.float64(0.25),
    "numpy float32": np.float32(0.25),
    "numpy float16": np.float16(0.25),
    "numpy int64": np.int64(1),
    "numpy uint8": np.uint8(1),
    "float tensor": torch.tensor(0.25),
    "float64 tensor": torch.tensor(0.25, dtype=torch.float64),
    "bfloat16 tensor": torch.tensor(0.25, dtype=torch.bfloat16),
    "one element": torch.tensor([0.25]),
    "one element of a matrix": torch.tensor([[0.25]]),
    "integer tensor": torch.tensor(1),
    "one integer": torch.tensor([1]),
}
TAKERS: dict[str, Callable[[Any], Tensor]] = {
    "temperature": lambda value: functional.supcon(X, Y, temperature=value),
    "base_temperature": lambda value: functional.supcon(X, Y, temperature=0.5, base_temperature=value),
    "both": lambda value: functional.supcon(X, Y, temperature=value, base_temperature=value),
    "epsilon": lambda value: functional.sincere(X, Y, epsilon=value),
    "alpha": lambda value: functional.spread(X, Y, alpha=value),
    "module temperature": lambda value: pysupcon.SINCERELoss(value)(X, Y),
    "learnable temperature": lambda value: pysupcon.SupConLoss(value, learnable_temperature=True)(X, Y),
    "module base_temperature": lambda value: pysupcon.SupConLoss(0.5, "all", value)(X, Y),
    "module epsilon": lambda value: pysupcon.SINCERELoss(0.5, value)(X, Y),
    "module alpha": lambda value: pysupcon.SpreadLoss(0.5, value)(X, Y),
    "compat.SupConLoss": lambda value: compat.SupConLoss(value, "all", value)(X, Y),
    "compat.SINCERELoss": lambda value: compat.SINCERELoss(value)(ROWS, ROW_LABELS),
    "compat.InfoNCELoss": lambda value: compat.InfoNCELoss(value)(X),
    "compat.EpsSupInfoNCELoss": lambda value: compat.EpsSupInfoNCELoss(value, value)(ROWS, ROW_LABELS),
    "compat.MetricLearningSupConLoss": lambda value: compat.MetricLearningSupConLoss(value)(ROWS, ROW_LABELS),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers(kind: str, taker: str) -> None:
    value = NUMBERS[kind]
    got, want = TAKERS[taker](value), TAKERS[taker](float(value))
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in NUMBERS if kind != "int"])
def test_numbers_as_temperature_of_a_compiled_function(kind: str) -> None:
    """No graph break, and a schedule of NumPy numbers does not recompile per value."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, temperature: functional.supcon(x, Y, temperature=temperature), backend=count, fullgraph=True
    )
    temperature = NUMBERS[kind]
    for _ in range(5):
        temperature = temperature + NUMBERS[kind]
        x, same = (X.clone().requires_grad_() for _ in range(2))
        got, want = compiled(x, temperature), functional.supcon(same, Y, temperature=temperature)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        first, second = torch.autograd.grad(got, x)[0], torch.autograd.grad(want, same)[0]
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)
    assert count.frame_count <= 2


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [False, True])
def test_a_learnable_temperature_gets_its_gradient_in_its_own_shape(
    shape: tuple[int, ...], dtype: torch.dtype, base: bool, backend: str
) -> None:
    def slope(call: Callable[[Any], Tensor], at: float) -> float:
        return (call(at * 1.001) - call(at / 1.001)).item() / (at * (1.001 - 1 / 1.001))

    x = X.double()
    calls: dict[str, Callable[[Any], Tensor]] = {
        name: lambda value, loss=loss: loss(x, Y, temperature=value, backend=backend)
        for name, loss in LOSSES.items()
    }
    if base:
        calls = {
            "base_temperature": lambda value: functional.supcon(
                x, Y, temperature=value, base_temperature=0.07, backend=backend
            ),
            "compat.SupConLoss": lambda value: compat.SupConLoss(value, backend=backend)(x, Y),
            "compat.SINCERELoss": lambda value: compat.SINCERELoss(value, backend=backend)(
                x.flatten(0, 1), ROW_LABELS
            ),
            "compat.MetricLearningSupConLoss": lambda value: compat.MetricLearningSupConLoss(
                value, backend=backend
            )(x.flatten(0, 1), ROW_LABELS),
        }
    for name, call in calls.items():
        temperature = nn.Parameter(torch.full(shape, 0.3, dtype=dtype))
        loss = call(temperature)
        assert loss.shape == (), name
        assert loss.dtype == torch.float64, name
        loss.backward()
        assert temperature.grad is not None, name
        assert temperature.grad.shape == shape, name
        # The error of a central difference is its squared step, 1e-6, times a third derivative.
        assert temperature.grad.item() == pytest.approx(slope(call, 0.3), rel=1e-4), name


def test_a_base_temperature_that_is_a_parameter() -> None:
    base = nn.Parameter(torch.tensor([0.2]))
    loss = functional.supcon(X, Y, temperature=0.1, base_temperature=base)
    loss.backward()
    assert base.grad is not None
    torch.testing.assert_close(base.grad, -loss.detach().reshape(1) / 0.2)


def test_a_float64_temperature_does_not_widen_the_loss() -> None:
    temperature = torch.tensor(0.1, dtype=torch.float64)
    assert functional.supcon(X, Y, temperature=temperature, base_temperature=0.07).dtype == torch.float32


def test_a_parameter_of_a_compat_loss_is_found_by_the_optimizer() -> None:
    loss = compat.SupConLoss(nn.Parameter(torch.tensor([0.1])))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]


INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_every_integer_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    loss = LOSSES[name]
    assert torch.equal(loss(X, Y.to(dtype), backend=backend), loss(X, Y, backend=backend))
    ids = torch.arange(6)
    got = loss(X, Y, instances=ids.to(dtype), backend=backend)
    assert torch.equal(got, loss(X, Y, instances=ids, backend=backend))
    got = loss(X, Y, candidates=X, candidate_labels=Y.to(dtype), backend=backend)
    assert torch.equal(got, loss(X, Y, candidates=X, candidate_labels=Y, backend=backend))


def test_labels_above_the_largest_int64_stay_apart() -> None:
    large = torch.tensor([2**64 - 1, 2**63, 2**64 - 1, 2**63 - 1, 2**63, 2**64 - 1], dtype=torch.uint64)
    assert torch.equal(functional.supcon(X, large), functional.supcon(X, Y))


COMPAT: dict[str, Callable[[Tensor], Tensor]] = {
    "SupConLoss": lambda labels: compat.SupConLoss()(X, labels),
    "SINCERELoss": lambda labels: compat.SINCERELoss()(ROWS, labels.repeat_interleave(2)),
    "MultiviewSINCERELoss": lambda labels: compat.MultiviewSINCERELoss()(X, labels),
    "EpsSupInfoNCELoss": lambda labels: compat.EpsSupInfoNCELoss()(ROWS, labels.repeat_interleave(2)),
    "MultiviewEpsSupInfoNCELoss": lambda labels: compat.MultiviewEpsSupInfoNCELoss()(X, labels),
    "MetricLearningSupConLoss": lambda labels: compat.MetricLearningSupConLoss()(X[:, 0], labels),
    "MetricLearningSupConLoss, labels": lambda labels: compat.MetricLearningSupConLoss()(
        X[:, 0], labels, ref_emb=X[:, 1], ref_labels=Y.clone()
    ),
    "MetricLearningSupConLoss, ref_labels": lambda labels: compat.MetricLearningSupConLoss()(
        X[:, 0], Y, ref_emb=X[:, 1], ref_labels=labels
    ),
}


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COMPAT)
def test_labels_of_the_other_losses(name: str, dtype: torch.dtype) -> None:
    assert torch.equal(COMPAT[name](Y.to(dtype)), COMPAT[name](Y.clone()))


@pytest.mark.parametrize("name", [name for name in COMPAT if "," not in name])
def test_boolean_labels_of_the_other_losses(name: str) -> None:
    assert torch.equal(COMPAT[name](Y == 0), COMPAT[name]((Y == 0).long()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    mask = (Y[:, None] == Y).to(dtype)
    torch.testing.assert_close(compat.SupConLoss()(X, mask=mask), compat.SupConLoss()(X, Y))


class CosineSimilarity:
    """The attributes of pytorch-metric-learning's default distance that the loss reads."""

    def __init__(self, p: int = 2) -> None:
        self.normalize_embeddings, self.p, self.power, self.is_inverted, self.collect_stats = (
            True,
            p,
            1,
            True,
            False,
        )


class AvgNonZeroReducer:
    """The same for its default reducer."""

    def __init__(self, low: float = 0) -> None:
        self.low, self.high, self.collect_stats = low, None, False


def test_explicit_defaults_need_no_package() -> None:
    explicit = compat.MetricLearningSupConLoss(
        distance=CosineSimilarity(),
        reducer=AvgNonZeroReducer(),
        embedding_regularizer=None,
        embedding_reg_weight=1,
    )
    assert torch.equal(explicit(ROWS, ROW_LABELS), compat.MetricLearningSupConLoss()(ROWS, ROW_LABELS))
    with pytest.raises(NotImplementedError, match=r"CosineSimilarity\(\), got CosineSimilarity with p=1"):
        compat.MetricLearningSupConLoss(distance=CosineSimilarity(p=1))
    with pytest.raises(
        NotImplementedError, match=r"AvgNonZeroReducer\(\), got AvgNonZeroReducer with low=0.5"
    ):
        compat.MetricLearningSupConLoss(reducer=AvgNonZeroReducer(low=0.5))
