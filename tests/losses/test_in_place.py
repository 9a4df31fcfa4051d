"""In-place changes between forward and backward raise an autograd error or have no effect. The gradient is
never silently wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from helpers.cases import LOSSES, NEEDS_INSTANCES
from torch import Tensor

import pysupcon
from pysupcon import functional
from pysupcon.pairs.global_batch import Block

BACKENDS = ["cpu", "tiled", "reference"]
REFUSED = "modified by an inplace operation"


def _batch(form: str, name: str) -> dict[str, Tensor]:
    """Tensors that a loss takes, by argument name; ``form`` says which."""
    count, views = 24, form.startswith("views")
    shape = (count, 2, 5) if views else (count, 5)
    batch = {"features": torch.randn(shape), "temperature": torch.tensor(0.3, dtype=torch.float64)}
    instances = torch.arange(count) % 4 * 8 + torch.arange(count) // 4 % 3  # three in a class
    if form.endswith("mask"):
        batch["mask"] = torch.arange(count)[:, None] % 4 == torch.arange(count) % 4
    else:
        batch["labels"] = torch.arange(count) % 4
    if name in NEEDS_INSTANCES and not views:
        batch["instances"] = instances
    if "candidates" in form:
        batch["candidates"] = torch.randn(count, 2, 5) if views else torch.randn(count, 5)
        if "labels" in batch:
            batch["candidate_labels"] = torch.arange(count) % 4
        if "instances" in batch:
            batch["candidate_instances"] = instances
    return batch


FORMS = {
    "rows": {},
    "views": {},
    "views, one anchor": {"contrast_mode": "one"},
    "rows and candidates": {},
    "views and candidates": {},
    "rows, mask": {},
    "views, mask": {},
    "rows and candidates, mask": {},
}


def _change(tensor: Tensor) -> None:
    """Changes a tensor in place, through a view: autograd counts the changes of a storage."""
    whole = tensor.view(-1)
    if tensor.dtype == torch.bool:
        whole.logical_not_()
    elif tensor.is_floating_point():
        whole.mul_(1.5)
    else:
        whole.div_(2, rounding_mode="floor")


def _gradients(
    loss: Callable[..., Tensor], batch: dict[str, Tensor], changed: str | None = None, *, before: bool = False
) -> list[Tensor] | str:
    """Gradients of features, candidates and temperature, or the message of the error. ``changed`` is changed
    in place between forward and backward, or ``before`` the forward."""
    held = {name: tensor.clone() for name, tensor in batch.items()}
    if changed is not None and before:
        _change(held[changed])
    leaves = [
        held[name].requires_grad_() for name in ("features", "candidates", "temperature") if name in held
    ]
    value = loss(**{name: tensor.view_as(tensor) for name, tensor in held.items()})
    if changed is not None and not before:
        with torch.no_grad():
            _change(held[changed])
    try:
        return list(torch.autograd.grad(value, leaves))
    except RuntimeError as error:
        return str(error)


def _check(loss: Callable[..., Tensor], batch: dict[str, Tensor]) -> dict[str, bool]:
    """Whether the change of each argument raised an error. Asserts that the others had no effect."""
    right = _gradients(loss, batch)
    assert not isinstance(right, str)
    refused = {}
    for name in batch:
        other = _gradients(loss, batch, name, before=True)
        assert any(not torch.equal(a, b) for a, b in zip(other, right, strict=True)), (
            f"{name} does not matter"
        )
        got = _gradients(loss, batch, name)
        refused[name] = isinstance(got, str)
        if isinstance(got, str):
            assert REFUSED in got, f"{name}: {got}"
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True)), name
    return refused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_are_refused_or_without_effect(backend: str, name: str, form: str) -> None:
    if backend == "cpu" and "mask" in form:
        pytest.skip("a mask runs on the tiled backend")
    if not pysupcon.backends()[backend]["available"]:
        pytest.skip(f"{backend} is not available")

    def loss(**arguments: Tensor) -> Tensor:
        return LOSSES[name](**arguments, backend=backend, **FORMS[form])

    refused = _check(loss, _batch(form, name))
    assert refused["features"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", ["features", "labels", "temperature"])
def test_statistics(backend: str, changed: str) -> None:
    def loss(**arguments: Tensor) -> Tensor:
        s = functional.pair_statistics(**arguments, backend=backend)
        return (s.negative_logsumexp - s.positive_mean + 0.5 * s.positive_logsumexp).sum()

    batch = _batch("rows", "supcon")
    right, got = _gradients(loss, batch), _gradients(loss, batch, changed)
    assert REFUSED in got if isinstance(got, str) else all(map(torch.equal, got, right))


@pytest.mark.parametrize("field", functional.PairStatistics._fields)
def test_returned_statistics_may_not_be_changed(field: str, backend: str) -> None:
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 3
    s = functional.pair_statistics(x, labels, backend=backend)
    value = (s.negative_logsumexp * s.positive_mean + s.positive_logsumexp).sum()
    (right,) = torch.autograd.grad(value, x, retain_graph=True)
    with torch.no_grad():
        getattr(s, field).mul_(2)
    try:
        (got,) = torch.autograd.grad(value, x)
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        got = right
    assert torch.equal(got, right)


@pytest.mark.parametrize("changed", ["features", "labels", "instances", "temperature"])
def test_compiled(changed: str, backend: str) -> None:
    torch._dynamo.reset()

    def loss(**arguments: Tensor) -> Tensor:
        return LOSSES["spread"](**arguments, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    batch = _batch("rows", "spread")
    right, got = _gradients(loss, batch), _gradients(compiled, batch, changed)
    if isinstance(got, str):
        assert REFUSED in got
    else:
        torch.testing.assert_close(got, right)


class _Alone:
    """Two processes; the other one has no rows. The exchange returns the tensor itself."""

    rank = 0

    def begin(self, features: Tensor, must_match: dict[str, int], candidates: Tensor | None = None) -> _Alone:
        self.samples = (features.shape[0], 0)
        if candidates is not None:
            self.candidates = _Alone().begin(candidates, {})
        return self

    def with_views(self, views: int) -> _Alone:
        return self

    def ids(self, own: Tensor) -> Tensor:
        return own

    def keep(self, rows: Tensor) -> Tensor | None:
        return rows.detach()

    def blocks(self, rows: Tensor, kept: Tensor | None) -> Generator[Block, None, None]:
        yield Block(0, self.samples[0], kept)

    def exchange(self, columns: Tensor) -> Tensor:
        return columns


@pytest.mark.parametrize(
    "form", ["rows", "views", "views, one anchor", "rows and candidates", "views and candidates"]
)
@pytest.mark.parametrize("name", LOSSES)
def test_gathered_losses(name: str, form: str, backend: str) -> None:
    def loss(**arguments: Tensor) -> Tensor:
        return alone(**arguments, gather=_Alone())

    def alone(**arguments: Any) -> Tensor:
        return LOSSES[name](**arguments, backend=backend, reduction="sum", **FORMS[form])

    batch = {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in _batch(form, name).items()
    }
    refused = _check(loss, batch)
    assert refused["labels"]  # of _Alone, which sends no copy
    torch.testing.assert_close(_gradients(loss, batch), _gradients(alone, batch))


@pytest.mark.parametrize("form", ["views", "rows and candidates", "rows, mask"])
@pytest.mark.parametrize("name", LOSSES)
def test_saved_tensors_hooks_see_everything(name: str, form: str) -> None:
    """Tensors for the backward pass through saved-tensor hooks and are freed afterwards."""
    batch, seen = _batch(form, name), []

    def loss(**arguments: Tensor) -> Tensor:
        return LOSSES[name](**arguments, **FORMS[form])

    def pack(tensor: Tensor) -> Any:
        seen.append(tensor.dtype)
        return tensor.numpy(force=True).copy()

    right = _gradients(loss, batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        moved = _gradients(loss, batch)
    assert torch.bool in seen if "mask" in form else torch.int64 in seen
    assert all(map(torch.equal, moved, right))
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, _gradients(loss, batch), right))
    changed = "mask" if "mask" in batch else "labels"
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):  # copies do not change
        assert all(map(torch.equal, _gradients(loss, batch, changed), right))


@pytest.mark.parametrize("gather", [None, _Alone()], ids=["", "gathered"])
def test_index_tensors_are_freed(gather: Any, backend: str) -> None:
    """A loss value that is kept does not keep the labels alive."""
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 3
    value = functional.supcon(x, labels, backend=backend, gather=gather)
    value.backward()
    held = weakref.ref(labels)
    del labels
    assert value.grad_fn is not None
    assert held() is None


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_labels_and_masks_of_inference_mode(backend: str) -> None:
    """Autograd cannot save such tensors, but a data loader may return them."""
    x = torch.randn(8, 4, requires_grad=True)
    with torch.inference_mode():
        labels = torch.arange(8) // 2
        mask = labels[:, None] == labels
    given = [{"labels": labels}, {"candidates": x.detach(), "labels": labels, "candidate_labels": labels}]
    for options in [*given, *([{"mask": mask}] if backend == "tiled" else [])]:
        got, want = (
            torch.autograd.grad(functional.supcon(x, backend=one, **options), x)[0]
            for one in (backend, "reference")
        )
        torch.testing.assert_close(got, want)
