"""torch.func and forward-mode derivatives are correct, or raise an error that names backend="reference",
which supports all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.cases import LOSSES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import pysupcon
from pysupcon import functional

NAMES = ["supcon", "eps_supinfonce", "cnce", "spread_sincere"]
LABELS = torch.arange(6) % 3
MANY_LABELS = torch.stack([LABELS, LABELS.flip(0), LABELS.roll(1)])
NO_FORWARD_MODE = 'no forward-mode derivative .* backend="reference"'
ONCE = 'differentiated once only.* backend="reference"'

Loss = Callable[..., Tensor]


def _loss(name: str, backend: str) -> Loss:
    def loss(x: Tensor, labels: Tensor = LABELS, temperature: float | Tensor = 0.3) -> Tensor:
        return LOSSES[name](x, labels, temperature=temperature, backend=backend)

    return loss


def _rows(*batch: int) -> Tensor:
    return torch.randn(*batch, 6, 2, 4, dtype=torch.float64)


def _gradient(loss: Loss, x: Tensor, *arguments: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *arguments), leaf)[0]


@pytest.mark.parametrize("name", NAMES)
def test_grad_and_vmap(name: str, backend: str) -> None:
    loss, dense, x = _loss(name, backend), _loss(name, "reference"), _rows(3)
    close = torch.testing.assert_close
    close(grad(loss)(x[0]), _gradient(dense, x[0]))
    close(vmap(loss)(x), torch.stack([dense(rows) for rows in x]))
    close(
        vmap(loss, in_dims=(2, 0))(x.movedim(0, 2), MANY_LABELS), torch.stack([*map(dense, x, MANY_LABELS)])
    )
    each = torch.stack([_gradient(dense, *pair) for pair in zip(x, MANY_LABELS, strict=True)])
    close(vmap(grad(loss))(x, MANY_LABELS), each)
    close(_gradient(lambda x: vmap(loss)(x, MANY_LABELS).sum(), x), each)


@pytest.mark.parametrize("name", NAMES)
def test_temperatures_under_transforms(name: str, backend: str) -> None:
    x, many = _rows(), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def of(backend: str) -> Loss:
        return lambda temperature: _loss(name, backend)(x, LABELS, temperature)

    want = torch.stack([_gradient(of("reference"), value) for value in many])
    torch.testing.assert_close(grad(of(backend))(many[0]), want[0])
    torch.testing.assert_close(vmap(grad(of(backend)))(many), want)
    torch.testing.assert_close(vmap(of(backend))(many), torch.stack([*map(of("reference"), many)]))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_masks_under_transforms(backend: str) -> None:
    x, masks = _rows(3), MANY_LABELS[:, :, None] == MANY_LABELS[:, None]

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return functional.supcon(x, mask=mask, temperature=0.3, backend=backend)

    dense = _loss("supcon", "reference")
    each = torch.stack([_gradient(dense, *pair) for pair in zip(x, MANY_LABELS, strict=True)])
    torch.testing.assert_close(vmap(grad(loss))(x, masks), each)


def test_gradients_of_candidates_and_of_every_anchor(backend: str) -> None:
    x, queue = _rows()[:, 0], torch.randn(5, 4, dtype=torch.float64)
    labels = torch.arange(5) % 3

    def rows(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, queue: functional.supcon(
            x, LABELS, candidates=queue, candidate_labels=labels, reduction="none", backend=backend
        )

    got, want = (jacrev(rows(name), argnums=(0, 1))(x, queue) for name in (backend, "reference"))
    torch.testing.assert_close(got, want)


def test_gradient_of_a_module(backend: str) -> None:
    x = _rows()

    def value(parameters: dict[str, Tensor], backend: str) -> Tensor:
        loss = pysupcon.SpreadLoss(0.3, learnable_temperature=True, backend=backend)
        return functional_call(loss, parameters, (x, LABELS))

    parameters = {"log_temperature": torch.tensor(-1.0, dtype=torch.float64)}
    got, want = (grad(value)(parameters, name) for name in (backend, "reference"))
    torch.testing.assert_close(got, want)


FORWARD: dict[str, Callable[[Loss, Tensor], object]] = {
    "jvp": lambda loss, x: jvp(loss, (x,), (x,)),
    "jvp of the temperature": lambda loss, x: jvp(
        lambda t: loss(x, LABELS, t), (torch.tensor(0.3),), (torch.tensor(1.0),)
    ),
    "jacfwd": lambda loss, x: jacfwd(loss)(x),
    "hessian": lambda loss, x: hessian(loss)(x),
    "forward over reverse": lambda loss, x: jvp(grad(loss), (x,), (x,)),
    "reverse over forward": lambda loss, x: grad(lambda x: jvp(loss, (x,), (x,))[1])(x),
    "linearize": lambda loss, x: torch.func.linearize(loss, x)[1](x),
    "dual numbers": lambda loss, x: _dual(loss, x),
    "dual numbers, compiled": lambda loss, x: torch.compile(lambda x: _dual(loss, x), backend="eager")(x),
}


def _dual(loss: Loss, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_is_refused(way: str, backend: str) -> None:
    for name in ("supcon", "spread_sincere"):
        with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
            FORWARD[way](_loss(name, backend), _rows())


def test_forward_mode_in_a_graph_is_refused(backend: str) -> None:
    loss = _loss("supcon", backend)
    compiled = torch.compile(lambda x: jvp(loss, (x,), (x,))[1], fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="forward-mode"):
        compiled(_rows())


SECOND: dict[str, Callable[[Loss, Tensor], object]] = {
    "grad of grad": lambda loss, x: grad(lambda x: grad(loss)(x).square().sum())(x),
    "jacrev of jacrev": lambda loss, x: jacrev(jacrev(loss))(x),
    "backward of grad": lambda loss, x: grad(loss)(x.requires_grad_()).square().sum().backward(),
    "vmap, then twice": lambda loss, x: vmap(grad(lambda x: grad(loss)(x).square().sum()))(x[None]),
}


@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_are_refused(way: str, backend: str) -> None:
    for name in ("supcon", "spread_sincere"):
        with pytest.raises(RuntimeError, match=ONCE):
            SECOND[way](_loss(name, backend), _rows())


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_takes_every_transform(name: str) -> None:
    loss, x, direction = _loss(name, "reference"), _rows(), _rows()
    gradient = _gradient(loss, x)
    torch.testing.assert_close(jvp(loss, (x,), (direction,))[1], (gradient * direction).sum())
    torch.testing.assert_close(jacfwd(loss)(x), gradient)
    product = jvp(grad(loss), (x,), (direction,))[1]  # Hessian times direction
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (want,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(product, want)
    step = 1e-6
    numeric = (_gradient(loss, x + step * direction) - _gradient(loss, x - step * direction)) / (2 * step)
    torch.testing.assert_close(product, numeric, rtol=1e-5, atol=1e-7)
    for way in (*FORWARD.values(), *SECOND.values()):
        way(loss, x.detach())


@pytest.mark.parametrize("name", ["supcon", "spread_sincere"])
def test_transforms_in_a_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    loss, dense, x = _loss(name, backend), _loss(name, "reference"), _rows(3)
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0]), _gradient(dense, x[0]))
    compiled = torch.compile(vmap(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.stack([dense(rows) for rows in x]))


@pytest.mark.parametrize("name", LOSSES)
def test_several_upstream_gradients_at_once(name: str, backend: str) -> None:
    """is_grads_batched, which torch.autograd.functional.jacobian(vectorize=True) uses."""
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) // 2

    def jacobian(backend: str) -> torch.Tensor:
        losses = LOSSES[name](x, labels, temperature=0.5, reduction="none", backend=backend).flatten()
        return torch.autograd.grad(losses, x, torch.eye(12, dtype=torch.float64), is_grads_batched=True)[0]

    torch.testing.assert_close(jacobian(backend), jacobian("reference"))


def test_jit_trace_is_refused_by_name(backend: str) -> None:
    x, labels = torch.randn(6, 4), torch.arange(6) // 2
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch.jit.trace.*backend=\"reference\""):
        torch.jit.trace(lambda v: functional.supcon(v, labels, backend=backend), (x,))
