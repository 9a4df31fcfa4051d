"""InfoNCELoss(symmetric=True), the loss of CLIP: the mean of both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import naive
from torch import Tensor

import pysupcon
from pysupcon.functional import info_nce


def _towers(images: int = 6, texts: int = 6) -> tuple[Tensor, Tensor]:
    sides = (torch.randn(count, 5, dtype=torch.float64) for count in (images, texts))
    first, second = (F.normalize(side, dim=1).requires_grad_() for side in sides)
    return first, second


def test_it_is_its_equation(backend: str) -> None:
    images, texts = _towers()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    logits, targets = images @ texts.T / temperature, torch.arange(6)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    loss = info_nce(images, candidates=texts, temperature=temperature, symmetric=True, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = images, texts, temperature
    grads = [torch.autograd.grad(value, leaves) for value in (loss, expected)]
    for got, truth in zip(*grads, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_instances_that_differ_in_number(backend: str, reduction: str) -> None:
    """Three texts of some images, none of others."""
    images, texts = _towers(4, 7)
    own, other = torch.tensor([5, 6, 7, 8]), torch.tensor([6, 5, 6, 6, 9, 7, 5])
    module = pysupcon.InfoNCELoss(0.3, symmetric=True, reduction=reduction, backend=backend)
    loss = module(images, candidates=texts, instances=own, candidate_instances=other)
    options: dict[str, Any] = {"temperature": 0.3, "reduction": reduction}
    first = naive("supcon", images, candidates=texts, instances=own, candidate_instances=other, **options)
    second = naive("supcon", texts, candidates=images, instances=other, candidate_instances=own, **options)
    torch.testing.assert_close(loss, (first + second) / 2, rtol=1e-12, atol=0)


def test_gradcheck(backend: str) -> None:
    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return info_nce(images, candidates=texts, temperature=0.5, symmetric=True, backend=backend)

    assert torch.autograd.gradcheck(loss, _towers(), fast_mode=True)


def test_compiled(backend: str) -> None:
    images, texts = _towers()
    module = pysupcon.InfoNCELoss(0.2, symmetric=True, backend=backend)
    compiled = torch.compile(lambda x, c: module(x, candidates=c), fullgraph=True, backend="aot_eager")
    values = compiled(images, texts), module(images, candidates=texts)
    torch.testing.assert_close(*values)
    for got, truth in zip(*(torch.autograd.grad(value, (images, texts)) for value in values), strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ({}, {}, "symmetric=True contrasts features and candidates with each other: give candidates"),
        (
            {"reduction": "none"},
            {"candidates": torch.ones(3, 5)},
            'symmetric=True needs reduction="mean" or "sum", got \'none\'',
        ),
        ({"symmetric": 2}, {}, "symmetric must be one of False, True, got int 2"),
    ],
)
def test_refusals(module: dict[str, Any], call: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pysupcon.InfoNCELoss(**{"symmetric": True, **module})(torch.ones(3, 2, 5), **call)


def test_not_symmetric_by_default() -> None:
    images, texts = _towers()
    one = info_nce(images, candidates=texts)
    assert torch.equal(one, info_nce(images, candidates=texts, symmetric=False))
    assert not torch.isclose(one, info_nce(texts, candidates=images))


@pytest.mark.parametrize("name", ["memory", "hard_negatives", "candidate_weights", "anchor_weights"])
def test_options_of_one_direction_are_refused(name: str) -> None:
    given = {name: torch.ones(4, 1, 3) if name == "hard_negatives" else torch.ones(4)}
    with pytest.raises(ValueError, match=f"contrasts both ways, and {name} belongs to one"):
        info_nce(torch.eye(4, 3), candidates=torch.eye(4, 3), symmetric=True, **given)
