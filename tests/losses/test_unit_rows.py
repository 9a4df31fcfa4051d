"""``normalize=True`` on rows of norm 0 or nearly 0, in every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import LOSSES
from torch import Tensor

from pysupcon import compat, functional
from pysupcon.models.concatenation import concatenate_unit_features
from pysupcon.pairs.normalize import smallest_norm, unit_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LABELS = torch.arange(16) % 3


def _rows(dtype: torch.dtype) -> Tensor:
    """[16, 8] of norms about 3, of which rows 0 to 5 are zero or shorter than the smallest norm."""
    rows = torch.randn(16, 8, dtype=torch.float64)
    small = smallest_norm(dtype)
    for at, norm in enumerate((0.0, 0.0, 0.9 * small, 0.5 * small, 1e-3 * small, 1e-20 * small)):
        rows[at] *= norm / rows[at].norm()
    return rows.to(dtype)


def _gradient(rows: Tensor, name: str = "supcon", **options: object) -> tuple[Tensor, Tensor]:
    x = rows.clone().requires_grad_()
    instances = torch.arange(16) % 6  # of one class each
    loss = LOSSES[name](x, LABELS, instances=instances, normalize=True, **options)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_without_a_direction_gets_no_gradient(name: str, dtype: torch.dtype, backend: str) -> None:
    rows = _rows(dtype)
    loss, grad = _gradient(rows, name, backend=backend)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert (grad[:6] == 0).all()
    assert (grad[6:] != 0).any(dim=1).all()
    rows[:6] = 0
    assert torch.equal(loss, _gradient(rows, name, backend=backend)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shortest_row_with_a_direction_keeps_a_finite_gradient(dtype: torch.dtype) -> None:
    rows = torch.randn(16, 8, dtype=torch.float64)
    rows[0] *= 1.5 * smallest_norm(dtype) / rows[0].norm()
    _, grad = _gradient(rows.to(dtype), temperature=0.5)
    assert torch.isfinite(grad).all()
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_are_what_torch_makes_of_them(dtype: torch.dtype) -> None:
    """Bit for bit, and so are their gradients."""
    rows = torch.randn(64, 8, dtype=torch.float64).mul(torch.logspace(-3, 4, 64)[:, None]).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(64, 8, dtype=wide)
    ours, theirs = (rows.clone().requires_grad_() for _ in range(2))
    first, second = unit_rows(ours), F.normalize(theirs.to(wide), dim=-1)
    assert first.dtype == wide
    assert torch.equal(first, second)
    first.backward(upstream)
    second.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_norm_that_overflows_is_refused(backend: str) -> None:
    """The square of 1e30 overflows float32: dividing by infinity would silently make the row zero."""
    rows = torch.randn(16, 8)
    rows[3] *= 1e30
    with pytest.raises(ValueError, match="features must be finite"):
        functional.supcon(rows, LABELS, normalize=True, backend=backend)
    want = functional.supcon(F.normalize(rows.double(), dim=1), LABELS, backend=backend)
    torch.testing.assert_close(
        functional.supcon(rows.double(), LABELS, normalize=True, backend=backend), want
    )


def test_separate_candidates_and_views() -> None:
    features, queue = (
        _rows(torch.float32).view(8, 2, 8).requires_grad_(),
        _rows(torch.float32).requires_grad_(),
    )
    loss = functional.supcon(
        features, LABELS[:8], candidates=queue, candidate_labels=LABELS, normalize=True, temperature=0.1
    )
    grads = torch.autograd.grad(loss, (features, queue))
    for grad in grads:
        flat = grad.reshape(16, 8)
        assert (flat[:6] == 0).all()
        assert torch.isfinite(flat).all()
        assert (flat[6:] != 0).any(dim=1).all()


def test_metric_learning_normalises_alike() -> None:
    x = _rows(torch.float32).requires_grad_()
    compat.MetricLearningSupConLoss()(x, LABELS).backward()
    assert x.grad is not None
    assert (x.grad[:6] == 0).all()
    assert x.grad.abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_normalises_alike(dtype: torch.dtype) -> None:
    """A projection whose last layer is a ReLU ends in zero rows."""
    x = _rows(dtype).requires_grad_()
    joined = concatenate_unit_features([x, x])
    assert joined.dtype == torch.float32
    (joined * torch.randn(16, 16)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:6] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformations(dtype: torch.dtype) -> None:
    """Compile, vmap and forward mode handle the same rows; second derivatives are finite."""
    rows = _rows(dtype)
    tangent = torch.randn_like(rows)
    want, along = torch.func.jvp(unit_rows, (rows,), (tangent,))
    assert torch.equal(want, unit_rows(rows))
    assert (along[:6] == 0).all()
    _, reference = torch.func.jvp(lambda x: F.normalize(x, dim=-1), (rows[6:],), (tangent[6:],))
    torch.testing.assert_close(along[6:], reference)
    assert torch.equal(torch.vmap(unit_rows)(rows), want)
    grads = torch.vmap(torch.func.grad(lambda row: (unit_rows(row) ** 3).sum()))(rows)
    assert (grads[:6] == 0).all()
    assert torch.isfinite(grads).all()
    hessian = torch.func.hessian(lambda x: (unit_rows(x) ** 3).sum())(rows)
    assert torch.isfinite(hessian).all()
    assert (hessian[:6] == 0).all()
    assert (hessian[:, :, :6] == 0).all()


def test_second_derivatives_of_ordinary_rows() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(unit_rows, x)


def test_compiled() -> None:
    rows = _rows(torch.float32)

    def loss(x: Tensor) -> Tensor:
        return functional.supcon(x, LABELS, normalize=True, temperature=0.1)

    gradients = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x = rows.clone().requires_grad_()
        call(x).backward()
        gradients.append(x.grad)
    assert (gradients[1][:6] == 0).all()
    torch.testing.assert_close(*gradients)
