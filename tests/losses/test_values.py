"""Every loss, option and backend against a reference written pair by pair in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import LOSSES, NEEDS_INSTANCES, naive
from helpers.tolerances import assert_gradient_close, assert_loss_close, largest_similarity
from torch import Tensor

import pysupcon
from pysupcon import functional
from pysupcon.pairs import slicing

B, V, D = 7, 2, 5


def _options(kind: str) -> dict[str, Any]:
    """Arguments besides features [7, 2, 5], one set per way to define the positives."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.tensor([3, -1, 3, 0, 3, 7, 0])  # 7 and -1 have their own second view only
    queue = torch.randn(6, D, generator=generator, dtype=torch.float64)
    ids = {"instances": torch.arange(B), "candidate_instances": torch.tensor([0, 0, 3, 5, 9, 2])}
    other = {"candidates": queue, "candidate_labels": torch.tensor([3, 3, 0, 7, 8, 3])}
    mask = torch.rand(B, B, generator=generator) < 0.4
    mask[2] = False  # an anchor without a positive
    mask[3] = True  # and one without a negative
    return {
        "labels": {"labels": labels},
        "self-supervised": {},
        "mask": {"mask": mask},  # asymmetric, its diagonal mixed
        "one": {"labels": labels, "contrast_mode": "one"},
        "one self-supervised": {"contrast_mode": "one"},
        "one mask": {"mask": mask, "contrast_mode": "one"},
        "instances": {"labels": labels, "instances": torch.tensor([4, 1, 4, 2, 9, 3, 5])},
        "candidates": {"labels": labels, **other, **ids},
        "candidates one": {"labels": labels, "contrast_mode": "one", **other, **ids},
        "candidates views": {
            "labels": labels,
            "candidates": queue.view(3, 2, D),
            "candidate_labels": torch.tensor([3, 0, 8]),
            "instances": torch.arange(B),
            "candidate_instances": torch.tensor([2, 3, 9]),
        },
        "candidates mask": {"mask": mask[:, :6], "candidates": queue, **ids},
        "candidates by position": {"candidates": torch.randn(B, D, generator=generator, dtype=torch.float64)},
    }[kind]


KINDS = [
    "labels",
    "self-supervised",
    "mask",
    "one",
    "one self-supervised",
    "one mask",
    "instances",
    "candidates",
    "candidates one",
    "candidates views",
    "candidates mask",
    "candidates by position",
]


def _run(
    loss: Any, features: Tensor, options: dict[str, Any], temperature: float, **more: Any
) -> list[Tensor]:
    """Loss, and gradients of features, temperature and candidates; anchors weighted unevenly."""
    features = features.clone().requires_grad_()
    scale = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    options = dict(options)
    leaves = [features, scale]
    if "candidates" in options:
        options["candidates"] = options["candidates"].to(features.dtype).requires_grad_()
        leaves.append(options["candidates"])
    value = loss(features, **options, temperature=scale, reduction="none", **more)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    (value * weights).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("where", ["cpu", "tiled", "small tiles", "reference"])
def test_every_option_in_float64(name: str, kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _options(kind)
    backend = "tiled" if where == "small tiles" else where
    if backend == "cpu" and "mask" in options:
        with pytest.raises(ValueError, match="by label only, not by mask"):
            LOSSES[name](torch.randn(B, V, D), backend="cpu", **options)
        return
    if not pysupcon.backends()[backend]["available"]:
        pytest.skip(pysupcon.backends()[backend]["detail"])
    if where == "small tiles":  # 14 rows in tiles of 3: every kind of tile, and a ragged last one
        monkeypatch.setattr(slicing, "_CPU_TILE", 3)
    features = torch.randn(B, V, D, dtype=torch.float64)
    got = _run(LOSSES[name], features, options, 0.3, backend=backend)
    want = _run(lambda x, **k: naive(name, x, **k), features, options, 0.3)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_reductions_leave_out_anchors_without_a_loss(name: str, reduction: str, backend: str) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 5])
    instances = torch.tensor([0, 1, 0, 2, 3, 4])  # labels 2 and 5 have no positive; 1 has no view
    features = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    more = {"instances": instances} if name in NEEDS_INSTANCES else {}
    got = LOSSES[name](features, labels, temperature=0.5, reduction=reduction, backend=backend, **more)
    want = naive(name, features, labels, temperature=0.5, reduction=reduction, instances=instances)
    torch.testing.assert_close(got, want)
    assert not torch.isnan(torch.autograd.grad(got.sum(), features)[0]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    """Error relative to the reference on the same (rounded) inputs; the loss is float32 at least, the
    gradient has the dtype of the input."""
    x = torch.nn.functional.normalize(torch.randn(65, 2, 32), dim=-1).to(dtype).requires_grad_()
    labels = torch.randint(0, 6, (65,))
    loss = LOSSES[name](x, labels, temperature=0.1, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    wide = x.detach().double().requires_grad_()
    truth = LOSSES[name](wide, labels, temperature=0.1, backend="reference")
    truth.backward()
    similarity = largest_similarity(wide, None, 0.1)
    assert_loss_close(loss.detach(), truth.detach(), dtype, similarity)
    assert x.grad is not None
    assert wide.grad is not None
    assert_gradient_close(x.grad, wide.grad, dtype, similarity, pull=10 / 130)


@pytest.mark.parametrize("kind", ["transposed views", "strided columns", "expanded", "sliced"])
def test_strides(kind: str, backend: str) -> None:
    features = {
        "transposed views": lambda: torch.randn(2, 9, 6, dtype=torch.float64).transpose(0, 1),
        "strided columns": lambda: torch.randn(9, 2, 12, dtype=torch.float64)[..., ::2],
        "expanded": lambda: torch.randn(9, 1, 6, dtype=torch.float64).expand(9, 2, 6),
        "sliced": lambda: torch.randn(20, 3, 8, dtype=torch.float64)[2:11, 1:, :6],
    }[kind]()
    labels = torch.randint(0, 3, (18,))[::2]
    for mode in ("all", "one"):
        got = _run(
            functional.supcon, features, {"labels": labels, "contrast_mode": mode}, 0.5, backend=backend
        )
        want = _run(
            functional.supcon,
            features.contiguous(),
            {"labels": labels, "contrast_mode": mode},
            0.5,
            backend="reference",
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


def test_normalize_and_base_temperature(backend: str) -> None:
    x = torch.randn(8, 2, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (8,))
    unit = torch.nn.functional.normalize(x, dim=-1)
    plain = functional.supcon(unit, labels, temperature=0.2, backend=backend)
    inside = functional.supcon(x, labels, temperature=0.2, normalize=True, backend=backend)
    torch.testing.assert_close(inside, plain)
    half = functional.supcon(unit, labels, temperature=0.2, base_temperature=0.4, backend=backend)
    torch.testing.assert_close(half, plain * 0.5)
    queue = torch.randn(5, 4, dtype=torch.float64)
    options = {"labels": labels, "candidate_labels": torch.tensor([0, 1, 2, 0, 1]), "backend": backend}
    torch.testing.assert_close(
        functional.supcon(x, candidates=queue, normalize=True, **options),
        functional.supcon(unit, candidates=torch.nn.functional.normalize(queue, dim=-1), **options),
    )


def test_pair_statistics(backend: str) -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 4, 4])
    stats = functional.pair_statistics(x, labels, temperature=0.5, backend=backend)
    s = x @ x.T / 0.5
    for i in range(9):
        same = [j for j in range(9) if j != i and labels[j] == labels[i]]
        other = [j for j in range(9) if labels[j] != labels[i]]
        assert stats.positive_count[i] == len(same)
        torch.testing.assert_close(stats.negative_logsumexp[i], s[i, other].logsumexp(0))
        if same:
            torch.testing.assert_close(stats.positive_logsumexp[i], s[i, same].logsumexp(0))
            torch.testing.assert_close(stats.positive_mean[i], s[i, same].mean())
        else:
            assert stats.positive_logsumexp[i] == -torch.inf
            assert stats.positive_mean[i] == 0


@pytest.mark.parametrize("rows", [511, 512, 513, 1025])  # the tile's edge and beyond
def test_tile_edges(rows: int, backend: str) -> None:
    x = torch.nn.functional.normalize(torch.randn(rows, 8, dtype=torch.float64), dim=-1).requires_grad_()
    labels = torch.randint(0, 5, (rows,))
    results = []
    for where in (backend, "reference"):
        pairs = torch.arange(rows) // 2
        loss = functional.spread(x, labels, instances=pairs, temperature=0.1, base="sincere", backend=where)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_large_batch_in_float32_meets_the_tolerance(backend: str) -> None:
    x = torch.nn.functional.normalize(torch.randn(3000, 64), dim=-1).requires_grad_()
    labels = torch.randint(0, 40, (3000,))
    loss = functional.supcon(x, labels, temperature=0.1, backend=backend)
    (grad,) = torch.autograd.grad(loss, x)
    wide = x.detach().double().requires_grad_()
    truth = functional.supcon(wide, labels, temperature=0.1, backend="reference")
    (true_grad,) = torch.autograd.grad(truth, wide)
    assert abs(loss.item() / truth.item() - 1) <= 2e-6
    assert (grad.double() - true_grad).norm() <= 5e-6 * true_grad.norm()
