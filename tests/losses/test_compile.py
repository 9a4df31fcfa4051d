"""torch.compile, torch.export, make_fx, fake and meta tensors: one graph without a break, with the values and
gradients of the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import CASES, LOSSES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pysupcon
from pysupcon import compat, functional
from pysupcon.pairs import ops
from pysupcon.pairs.statistics import Memory, Pairing, Plan
from pysupcon.pairs.tiles import PositiveMask

COMPILED = pysupcon.backends()["cpu"]
needs_extension = pytest.mark.skipif(not COMPILED["available"], reason=COMPILED["detail"])

MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    **{name: partial(loss, temperature=0.2) for name, (loss, own) in CASES.items() if not own},
    "supcon one": lambda **k: pysupcon.SupConLoss(0.2, "one", 0.1, normalize=True, **k),
    "sincere": lambda **k: pysupcon.SINCERELoss(0.2, 0.1, **k),
    "spread": lambda **k: pysupcon.SpreadLoss(0.2, base="sincere", learnable_temperature=True, **k),
    "info_nce": lambda **k: pysupcon.InfoNCELoss(0.2, **k),
}
#: More than two tiles of rows.
MANY = 560


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Model(torch.nn.Module):
    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(6, 4)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self.loss, pysupcon.InfoNCELoss):
            return self.loss(self.encoder(x))
        return self.loss(self.encoder(x), labels)


def _batch(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 2, 6, dtype=dtype), torch.randint(0, 3, (samples,))


def _results(model: Callable[..., Tensor], parameters: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Loss and gradients, float64."""
    loss = model(*arguments)
    grads = torch.autograd.grad(loss.sum(), list(parameters))
    return loss.detach().double(), *(grad.double() for grad in grads)


def _truth(model: Model, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    dense = copy.deepcopy(model).double()
    dense.loss.backend = "reference"
    return _results(dense, dense.parameters(), x.double(), labels)


@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_graph_break(name: str, backend: str) -> None:
    model = Model(MODULES[name](backend=backend)).double()
    x, labels = _batch(10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_results(compiled, model.parameters(), x, labels), _truth(model, x, labels))


@pytest.mark.parametrize("name", ["supcon", "spread"])
def test_the_reference_compiles(name: str) -> None:
    test_compiles_without_a_graph_break(name, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [10, MANY])
@pytest.mark.parametrize("name", MODULES)
def test_compiles_with_inductor(name: str, samples: int, dtype: torch.dtype, backend: str) -> None:
    """Only "supcon one" normalises rows. Float32 tolerances are relative to the gradient's norm."""
    model = Model(MODULES[name](backend=backend)).to(dtype)
    x, labels = _batch(samples, dtype)
    got = _results(torch.compile(model, fullgraph=True), model.parameters(), x, labels)
    for value, want in zip(got, _truth(model, x, labels), strict=True):
        error = (value - want).norm() / want.norm()
        assert error <= (1e-9 if dtype == torch.float64 else 1e-4)  # parts of the gradient cancel


def _arguments(kind: str, x: Tensor) -> dict[str, Any]:
    labels = torch.arange(6) % 3
    return {
        "mask": {"mask": (labels[:, None] == labels) | (labels[:, None] < labels)},
        "candidates": {
            "labels": labels,
            "candidates": x.flip(0).detach(),
            "candidate_labels": labels.roll(1),
        },
        "queue without labels": {"candidates": x[:, :1] + 0.1},
        "one, none": {"labels": labels, "contrast_mode": "one", "reduction": "none"},
        "sum": {"labels": labels, "reduction": "sum", "normalize": True},
    }[kind]


@pytest.mark.parametrize("kind", ["mask", "candidates", "queue without labels", "one, none", "sum"])
def test_every_form_of_a_problem_compiles(kind: str, backend: str) -> None:
    if kind == "mask" and backend == "cpu":
        pytest.skip("masks run on the tiled backend")
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    for name in ("supcon", "spread_sincere"):
        if name == "spread_sincere" and kind == "candidates":
            continue  # it would need the candidates' instances

        def call(x: Tensor, backend: str, name: str = name) -> Tensor:
            return LOSSES[name](x, temperature=0.3, backend=backend, **_arguments(kind, x)).sum()

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got, want = _results(compiled, [x], x, backend), _results(call, [x], x, "reference")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["SupConLoss", "MultiviewSINCERELoss", "MetricLearningSupConLoss"])
def test_losses_of_other_libraries_compile(name: str, backend: str) -> None:
    x, labels = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3
    loss, dense = (getattr(compat, name)(0.3, backend=b) for b in (backend, "reference"))
    if name == "MetricLearningSupConLoss":
        compiled = torch.compile(lambda x: loss(x[:, 0], labels), fullgraph=True, backend="aot_eager")
        want = _results(lambda x: dense(x[:, 0], labels), [x], x)
    else:
        compiled = torch.compile(lambda x: loss(x, labels), fullgraph=True, backend="aot_eager")
        want = _results(lambda x: dense(x, labels), [x], x)
    torch.testing.assert_close(_results(compiled, [x], x), want)


def test_a_mask_of_numbers_compiles() -> None:
    x, mask = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True), torch.eye(6)
    loss = compat.SupConLoss(0.3)
    compiled = torch.compile(lambda x, mask: loss(x, mask=mask), fullgraph=True, backend="aot_eager")
    dense = compat.SupConLoss(0.3, backend="reference")
    torch.testing.assert_close(_results(compiled, [x], x, mask), _results(dense, [x], x, None, mask))


def test_statistics_compile(backend: str) -> None:
    x, labels = torch.randn(8, 4, dtype=torch.float64, requires_grad=True), torch.arange(8) % 3

    def call(x: Tensor, backend: str) -> Tensor:
        n, p, mean, count = functional.pair_statistics(x, labels, temperature=0.3, backend=backend)
        return n + 2 * p + 3 * mean + count

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_results(compiled, [x], x, backend), _results(call, [x], x, "reference"))


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "temperature": lambda x, y, t, b: functional.supcon(x, y, temperature=t, backend=b),
    "temperature of cnce": lambda x, y, t, b: LOSSES["cnce"](x, y, temperature=t, backend=b),
    "base_temperature": lambda x, y, t, b: functional.supcon(x, y, base_temperature=t, backend=b),
    "alpha": lambda x, y, t, b: functional.spread(x, y, alpha=t, backend=b),
    "epsilon": lambda x, y, t, b: functional.sincere(x, y, epsilon=t, temperature=t + 0.1, backend=b),
}  # fmt: skip


def _follows(name: str, backend: str, compiler: str) -> None:
    """A number that changes from call to call: correct values, and no recompilation per value."""
    counter = CompileCounterWithBackend(compiler)
    call = NUMBERS[name]
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x, labels = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3
    for step in range(5):
        number = 0.15 + 0.1 * step
        got = _results(compiled, [x], x, labels, number, backend)
        torch.testing.assert_close(got, _results(call, [x], x, labels, number, "reference"))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change(name: str, backend: str) -> None:
    _follows(name, backend, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change_with_inductor(name: str, backend: str) -> None:
    _follows(name, backend, "inductor")


@pytest.mark.parametrize(("dynamic", "marked"), [(None, False), (True, False), (None, True)])
@pytest.mark.parametrize("name", ["supcon", "sincere", "cnce"])
def test_batch_sizes_that_change(name: str, dynamic: bool | None, marked: bool, backend: str) -> None:
    """With a learnable temperature; one and two tiles of rows."""
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(MODULES[name](backend=backend, learnable_temperature=True)).double()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for samples in (10, 11, 300, 13):
        x, labels = _batch(samples)
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(labels, 0)
        got = _results(compiled, model.parameters(), x, labels)
        torch.testing.assert_close(got, _truth(model, x, labels))
    assert counter.frame_count <= (1 if dynamic or marked else 2)


def test_instances_and_masks_of_changing_sizes(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor, labels: Tensor, own: Tensor, backend: str) -> Tensor:
        loss = functional.spread(x, labels, instances=own, temperature=0.3, backend=backend)
        mask = labels[:, None] == labels
        return loss + functional.supcon(x, mask=mask, backend="tiled" if backend == "cpu" else backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for samples in (12, 14, 300):
        x = torch.randn(samples, 4, dtype=torch.float64, requires_grad=True)
        labels, own = torch.arange(samples) // 2 % 3, torch.arange(samples) // 2
        got = _results(compiled, [x], x, labels, own, backend)
        torch.testing.assert_close(got, _results(call, [x], x, labels, own, "reference"))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_number_out_of_range_is_refused_in_a_graph_too(temperature: float, backend: str) -> None:
    compiled = torch.compile(
        lambda x, t: functional.supcon(x, temperature=t, backend=backend), backend="eager"
    )
    x = torch.randn(4, 2, 3)
    for good in (0.1, 0.2):  # from the second value on it is symbolic
        compiled(x, good)
    with pytest.raises(ValueError, match="temperature must be"):
        compiled(x, temperature)


def test_rows_that_are_not_finite_are_refused_in_a_graph_too(backend: str) -> None:
    compiled = torch.compile(
        lambda x: functional.supcon(x, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="finite"):
        compiled(torch.full((4, 2, 3), float("nan")))


def _operator_arguments(kind: str, backend: str) -> tuple[Any, ...]:
    """Arguments of torch.ops.pysupcon.row_statistics."""
    x, labels = torch.randn(7, 5, requires_grad=True), torch.tensor([2, 0, 2, 1, 0, 2, 5])
    scale = torch.tensor(2.0, dtype=ops.stats_dtype(x), requires_grad=True)
    order = torch.argsort(labels, stable=True)
    pairing: dict[str, Any] = {"labels": labels, "order": order}
    mask, memory, outside, queue = None, None, None, None
    if kind != "self":
        others, queue = torch.tensor([5, 2, 2, 0, 2, 1]), torch.randn(6, 5, requires_grad=True)
        by_label = torch.argsort(others, stable=True)
        pairing |= {"candidate_labels": others, "candidate_order": by_label}
    if kind == "mask":
        mask = PositiveMask(torch.rand(7, 6) > 0.5, torch.arange(7), torch.arange(6))
    if kind == "memory":
        assert queue is not None
        pairing["candidate_log_weights"] = torch.randn(6, dtype=torch.float64)
        memory = Memory(queue.detach() + 1, others, by_label, None, torch.randn(6, dtype=torch.float64))
        outside = torch.randn(7, dtype=torch.float64, requires_grad=True)
    plan = Plan(backend, Pairing(**pairing), mask, memory=memory)
    epsilon = None if kind == "self" else torch.tensor(0.1, dtype=torch.float64)
    return x, queue, scale, outside, epsilon, *plan.tensors, backend, True, True, True


@pytest.mark.parametrize("kind", ["self", "candidates", "mask", "memory"])
def test_the_traced_operators_keep_the_dispatcher_contract(kind: str, backend: str) -> None:
    """Schema, registration, fake and the trace of forward and backward."""
    if kind == "mask" and backend == "cpu":
        pytest.skip("masks run on the tiled backend")
    arguments = _operator_arguments(kind, backend)
    torch.library.opcheck(torch.ops.pysupcon.row_statistics.default, arguments)
    if kind == "mask":
        mask = arguments[14:17]
        torch.library.opcheck(torch.ops.pysupcon.masked_positive_count.default, (*mask, None, False))


def _gradient(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(call(leaf), leaf)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["supcon", "spread_sincere"])
def test_make_fx(name: str, mode: str, backend: str) -> None:
    def call(x: Tensor, labels: Tensor, backend: str) -> Tensor:
        leaf = x.detach().requires_grad_()
        loss = LOSSES[name](leaf, labels, temperature=0.3, backend=backend)
        return torch.autograd.grad(loss, leaf)[0]

    x, labels = torch.randn(6, 2, 4, dtype=torch.float64), torch.arange(6) % 3
    graph = make_fx(lambda x, labels: call(x, labels, backend), tracing_mode=mode)(x, labels)
    torch.testing.assert_close(graph(x + 1, labels.roll(1)), call(x + 1, labels.roll(1), "reference"))
    if mode == "symbolic":
        x, labels = torch.randn(9, 2, 4, dtype=torch.float64), torch.arange(9) % 4
        torch.testing.assert_close(graph(x, labels), call(x, labels, "reference"))


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wish", ["auto", "tiled", "reference"])
def test_shapes_without_values(where: str, name: str, wish: str) -> None:
    device = "meta" if where == "meta" else "cpu"
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        x, labels = torch.empty(6, 2, 4, requires_grad=True), torch.zeros(6, dtype=torch.int64)
        loss = LOSSES[name](x, labels, temperature=0.3, backend=wish, reduction="none")
        loss.sum().backward()
    assert (loss.shape, loss.dtype, loss.device.type) == ((6, 2), torch.float32, device)
    assert x.grad is not None
    assert (x.grad.shape, x.grad.dtype, x.grad.device.type) == (x.shape, torch.float32, device)


@pytest.mark.parametrize("name", [*LOSSES, "mask", "candidates"])
def test_the_default_device_is_not_that_of_the_rows(name: str, backend: str) -> None:
    """A loss allocates all tensors on the device of its rows."""
    x, labels = torch.randn(6, 2, 4, dtype=torch.float64), torch.arange(6) % 3
    extra: dict[str, Any] = {"labels": labels}
    if name == "mask":
        extra, backend = {"mask": labels[:, None] == labels}, "tiled"
    elif name == "candidates":
        extra |= {"candidates": x.flip(0), "candidate_labels": labels}
    loss = LOSSES.get(name, functional.supcon)

    def call(x: Tensor, backend: str = backend) -> Tensor:
        return loss(x, temperature=0.3, backend=backend, **extra)

    want = _gradient(lambda x: call(x, "reference"), x)
    torch.set_default_device("meta")
    try:
        got = _gradient(call, x)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["supcon", "spread", "sincere"])
def test_export(name: str, strict: bool, backend: str) -> None:
    """The exported program accepts another batch size and can be trained."""
    model = Model(MODULES[name](backend=backend)).double()
    size = torch.export.Dim("size", min=2, max=4096)
    x, labels = _batch(6)
    program = torch.export.export(
        model, (x, labels), strict=strict, dynamic_shapes={"x": {0: size}, "labels": {0: size}}
    )
    exported = program.module()
    x, labels = _batch(9)
    got = _results(exported, dict(sorted(exported.named_parameters())).values(), x, labels)
    dense = copy.deepcopy(model)
    dense.loss.backend = "reference"
    want = _results(dense, dict(sorted(dense.named_parameters())).values(), x, labels)
    torch.testing.assert_close(got, want)
