"""HierarchicalSupConLoss against the weighted sum, or the weighted running maximum, of SupCon by level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import naive
from helpers.tolerances import GRADCHECK, assert_gradient_close, assert_loss_close, largest_similarity
from torch import Tensor

import pysupcon
from pysupcon import functional
from pysupcon.distributed import AllGather
from pysupcon.profiling.recorder import allocated_peak

FINE = torch.tensor([3, 3, -7, -7, 0, 0, 5, 8])
MIDDLE = torch.tensor([1, 1, 1, 1, 0, 0, 0, 2])
COARSE = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2**40])
LEVELS = [FINE, MIDDLE, COARSE]
WEIGHTS = (1.0, 0.5, 0.25)


def oracle(x: Tensor, constrained: bool = False, weights: Any = WEIGHTS, **options: Any) -> Tensor:
    """From SupCon of each level, pair by pair in float64."""
    others = options.pop("candidate_labels", [None] * 3)
    losses = [
        naive("supcon", x, ids, candidate_labels=other, **options)
        for ids, other in zip(LEVELS, others, strict=True)
    ]
    if constrained:
        losses = [torch.stack(losses[: level + 1]).max() for level in range(3)]
    return sum(
        (weight * loss for weight, loss in zip(weights, losses, strict=True)), torch.zeros(()).double()
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"constrained": True},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"contrast_mode": "one"},
    {"candidates": True},
]


def _inputs(options: dict[str, Any], views: int) -> tuple[Tensor, dict[str, Any]]:
    x = torch.randn(8, views, 3, dtype=torch.float64)
    options = {"temperature": 0.6, **options}
    if "candidates" in options:
        options["candidates"] = torch.randn(5, 2, 3, dtype=torch.float64)
        options["candidate_labels"] = [ids[[0, 7, 2, 5, 4]] for ids in LEVELS]
    return x, options


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options: dict[str, Any], views: int, backend: str) -> None:
    x, given = _inputs(options, views)
    for which in (backend, "reference"):
        got = functional.hierarchical_supcon(x, LEVELS, level_weights=WEIGHTS, backend=which, **given)
        want = oracle(x, **given)
        torch.testing.assert_close(got.flatten(), want.flatten(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options: dict[str, Any], backend: str) -> None:
    """Features, temperature and candidates."""
    x, given = _inputs(options, 2)
    inputs = [x.requires_grad_(), torch.tensor(given.pop("temperature")).double().requires_grad_()]
    if "candidates" in given:
        inputs.append(given.pop("candidates").requires_grad_())

    def loss(x: Tensor, temperature: Tensor, *candidates: Tensor) -> Tensor:
        further = {"candidates": candidates[0]} if candidates else {}
        return functional.hierarchical_supcon(
            x, LEVELS, level_weights=WEIGHTS, temperature=temperature, backend=backend, **further, **given
        )

    assert torch.autograd.gradcheck(loss, inputs, **GRADCHECK)


def test_the_constraint_has_an_effect() -> None:
    """A finer level with the larger loss replaces a coarser one, also in the gradient."""
    x = torch.nn.functional.normalize(torch.randn(8, 6, dtype=torch.float64), dim=-1)
    x[1] = -x[0]  # a fine class whose rows are opposite
    x.requires_grad_()
    weights, options = (0.0, 1.0, 0.0), {"temperature": 0.1}
    losses = [functional.supcon(x, ids, **options) for ids in LEVELS]
    assert losses[0] > losses[1]
    got = functional.hierarchical_supcon(x, LEVELS, level_weights=weights, constrained=True, **options)
    torch.testing.assert_close(got, losses[0])
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(losses[0], x))


def test_one_level_is_supcon() -> None:
    x, ids = torch.randn(40, 2, 8, dtype=torch.float64), torch.randint(7, (40,))
    loss = pysupcon.HierarchicalSupConLoss([1.0], temperature=0.2, normalize=True)
    torch.testing.assert_close(loss(x, [ids]), pysupcon.SupConLoss(0.2, normalize=True)(x, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x = torch.nn.functional.normalize(torch.randn(60, 16), dim=-1).to(dtype).requires_grad_()
    levels = [torch.arange(60) // 4, torch.arange(60) // 20]
    truth = x.detach().double().requires_grad_()
    got = functional.hierarchical_supcon(x, levels, level_weights=(1.0, 0.5), temperature=0.2)
    want = functional.hierarchical_supcon(
        truth, levels, level_weights=(1.0, 0.5), temperature=0.2, backend="reference"
    )
    got.backward()
    want.backward()
    similarity = largest_similarity(x, None, 0.2)
    assert_loss_close(got, want.detach(), dtype, similarity)
    assert_gradient_close(x.grad, truth.grad, dtype, similarity, pull=1.5 / (0.2 * 60))


@pytest.mark.parametrize("constrained", [False, True])
def test_compile_without_a_graph_break(constrained: bool) -> None:
    torch._dynamo.reset()
    loss = pysupcon.HierarchicalSupConLoss(WEIGHTS, constrained, 0.2, learnable_temperature=True)
    compiled = torch.compile(lambda x, labels: loss(x, labels), fullgraph=True, backend="aot_eager")
    for rows in (12, 9):
        x = torch.randn(rows, 2, 5)
        levels = [torch.randint(classes, (rows,)) for classes in (6, 3, 2)]
        results = []
        for function in (loss, compiled):
            y = x.clone().requires_grad_()
            loss.zero_grad()
            value = function(y, levels)
            value.backward()
            results.append((value.detach(), y.grad, loss.log_temperature.grad.clone()))
        torch.testing.assert_close(*results)


def test_memory_grows_with_rows_not_pairs() -> None:
    """What torch allocates. A bool for each pair would add 3 MiB from N = 1024 to 2048."""

    def peak(rows: int) -> int:
        x, levels = (
            torch.randn(rows, 8, requires_grad=True),
            [torch.arange(rows) // 8, torch.arange(rows) % 3],
        )

        def work() -> None:
            functional.hierarchical_supcon(x, levels, level_weights=(1.0, 1.0)).backward()

        return allocated_peak(torch.device("cpu"), work)

    assert peak(2048) < peak(1024) + 2**20


X = torch.randn(8, 3)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (torch.stack(LEVELS), {}, TypeError, r"labels must be a list or tuple of integer tensors of shape"),
        (None, {}, TypeError, "labels must be a list or tuple of integer tensors"),
        (LEVELS[:2], {}, ValueError, "labels must hold one tensor per level, as level_weights 3, got list"),
        ([FINE, MIDDLE.float(), COARSE], {}, ValueError, r"labels\[1\] must be integers of shape"),
        ([FINE, MIDDLE, COARSE[:4]], {}, ValueError, r"labels\[2\] must be integers of shape \[N\]=\[8\]"),
        (LEVELS, {"level_weights": 1.0}, TypeError, "level_weights must be a list or tuple of numbers"),
        (LEVELS, {"level_weights": (1, -1, 1)}, ValueError, r"level_weights\[1\] must be from 0 to"),
        (LEVELS, {"constrained": True, "reduction": "sum"}, ValueError, 'must be "mean", got \'sum\''),
        (LEVELS, {"constrained": "yes"}, ValueError, "constrained must be one of False, True"),
        (LEVELS, {"gather": AllGather()}, ValueError, "does not support gather"),
        (LEVELS, {"candidates": X}, ValueError, "candidate_labels must be given when labels and candidates"),
        (LEVELS, {"candidates": X, "candidate_labels": LEVELS[:1]}, ValueError, r"one per level \(3\), got"),
        (LEVELS, {"multi_label": "any"}, TypeError, "unexpected keyword argument 'multi_label'"),
    ],
)  # fmt: skip
def test_errors(labels: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.hierarchical_supcon(X, labels, **{"level_weights": WEIGHTS, **options})


def test_errors_of_the_module() -> None:
    for options in ({"gather": True}, {"constrained": True, "reduction": "none"}, {"multi_label": "any"}):
        with pytest.raises(ValueError, match=r"not support gather|must be \"mean\"|not take labels of shape"):
            pysupcon.HierarchicalSupConLoss(WEIGHTS, **options)
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        pysupcon.SupConLoss()(X, LEVELS[0].float())
    with pytest.raises(TypeError, match="labels must be integers"):
        pysupcon.SupConLoss()(X, LEVELS)  # a sequence of levels is for this loss only
    shown = repr(pysupcon.HierarchicalSupConLoss(WEIGHTS, constrained=True))
    assert "level_weights=(1.0, 0.5, 0.25), constrained=True" in shown
