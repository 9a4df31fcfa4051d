"""Gradients against central differences in float64: every loss, every option that changes mathematics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import LOSSES
from helpers.tolerances import GRADCHECK

from pysupcon import functional

B, D = 5, 3
LABELS = torch.tensor([1, 0, 1, 2, 0])


def _features() -> torch.Tensor:
    return torch.randn(B, 2, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"labels": LABELS}, id="labels"),
        pytest.param({}, id="self-supervised"),
        pytest.param({"labels": LABELS, "contrast_mode": "one"}, id="one"),
        pytest.param({"labels": LABELS, "normalize": True}, id="normalize"),
        pytest.param({"labels": LABELS, "reduction": "sum"}, id="sum"),
        pytest.param({"labels": LABELS, "reduction": "none"}, id="none"),
        pytest.param({"labels": torch.zeros(B, dtype=torch.int64)}, id="one class"),
        pytest.param({"labels": LABELS, "instances": torch.tensor([0, 1, 0, 2, 3])}, id="instances"),
    ],
)
def test_features(name: str, options: dict[str, Any], backend: str) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](x, temperature=0.6, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, (_features(),), **GRADCHECK)


@pytest.mark.parametrize("name", LOSSES)
def test_mask(name: str) -> None:
    mask = torch.rand(B, B) < 0.5
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, mask=mask, temperature=0.6), (_features(),), **GRADCHECK
    )


@pytest.mark.parametrize("name", LOSSES)
def test_temperature(name: str, backend: str) -> None:
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    queue = torch.randn(B, D, dtype=torch.float64)
    for options in ({}, {"contrast_mode": "one"}, {"candidates": queue, "candidate_labels": LABELS}):
        assert torch.autograd.gradcheck(
            lambda x, t, options=options: LOSSES[name](x, LABELS, temperature=t, backend=backend, **options),
            (_features(), temperature),
            **GRADCHECK,
        )


@pytest.mark.parametrize("name", LOSSES)
def test_candidates(name: str, backend: str) -> None:
    queue = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    ids = {"instances": torch.arange(B), "candidate_instances": torch.tensor([0, 2, 2, 4])}

    def loss(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        labels = torch.tensor([1, 1, 0, 2])
        return LOSSES[name](x, LABELS, candidates=c, candidate_labels=labels, backend=backend, **ids)

    assert torch.autograd.gradcheck(loss, (_features(), queue), **GRADCHECK)
    # Only one side requires a gradient.
    assert torch.autograd.gradcheck(loss, (_features().detach(), queue), **GRADCHECK)
    assert torch.autograd.gradcheck(loss, (_features(), queue.detach()), **GRADCHECK)


@pytest.mark.parametrize("field", ["negative_logsumexp", "positive_logsumexp", "positive_mean"])
def test_pair_statistics(field: str, backend: str) -> None:
    assert torch.autograd.gradcheck(
        lambda x: getattr(functional.pair_statistics(x, LABELS, temperature=0.6, backend=backend), field),
        (_features(),),
        **GRADCHECK,
    )


def test_base_temperature_of_a_learnable_temperature(backend: str) -> None:
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, t: functional.supcon(x, LABELS, temperature=t, base_temperature=0.1, backend=backend),
        (_features(), temperature),
        **GRADCHECK,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_reference_differentiates_twice(name: str) -> None:
    assert torch.autograd.gradgradcheck(
        lambda x: LOSSES[name](x, LABELS, temperature=0.6, backend="reference"), (_features(),), **GRADCHECK
    )
