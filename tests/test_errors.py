"""Bad input: each error names the argument, the contract and what came."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LOSSES

import pysupcon
from pysupcon import _checks, _ops, functional

X = torch.randn(4, 2, 3)
ROWS = torch.randn(4, 3)
Y = torch.tensor([0, 1, 0, 1])
supcon = functional.supcon

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "features not a tensor": (
        lambda: supcon([[1.0]], Y),
        TypeError,
        "features must be a float tensor of shape [N, D] or [B, V, D], got list [[1.0]]",
    ),
    "features of one dimension": (
        lambda: supcon(torch.randn(4), Y),
        ValueError,
        "features must be float64, float32, bfloat16 or float16 of shape [N, D] or [B, V, D] with D "
        "and V at least 1, "
        "got float32 of shape [4]",
    ),
    "features without width": (
        lambda: supcon(torch.randn(4, 0), Y),
        ValueError,
        "got float32 of shape [4, 0]",
    ),
    "integer features": (lambda: supcon(ROWS.long(), Y), ValueError, "got int64 of shape [4, 3]"),
    "float labels": (
        lambda: supcon(X, Y.float()),
        ValueError,
        "labels must be int64 of shape [B]=[4] (one per sample), got float32 of shape [4]",
    ),
    "boolean labels": (lambda: supcon(X, Y.bool()), ValueError, "got bool of shape [4]"),
    "labels of another length": (
        lambda: supcon(ROWS, Y[:3]),
        ValueError,
        "labels must be int64 of shape [N]=[4] (one per sample), got int64 of shape [3]",
    ),
    "labels as a column": (lambda: supcon(X, Y[:, None]), ValueError, "got int64 of shape [4, 1]"),
    "labels as a list": (lambda: supcon(X, [0, 1, 0, 1]), TypeError, "labels must be int64 of shape [B]=[4]"),
    "labels elsewhere": (
        lambda: supcon(X, Y.to("meta")),
        ValueError,
        "labels must be int64 of shape [B]=[4] (one per sample) on cpu, got it on meta",
    ),
    "labels and mask": (
        lambda: supcon(X, Y, torch.ones(4, 4, dtype=torch.bool)),
        ValueError,
        "labels and mask both say who is a positive: give one of them",
    ),
    "float mask": (
        lambda: supcon(X, mask=torch.ones(4, 4)),
        ValueError,
        "mask must be bool of shape [4, 4] (samples of features x samples of candidates), got "
        "float32 of shape [4, 4]",
    ),
    "mask of another shape": (
        lambda: supcon(X, mask=torch.ones(8, 8, dtype=torch.bool)),
        ValueError,
        "got bool of shape [8, 8]",
    ),
    "mask as a list": (lambda: supcon(X, mask=[[True]]), TypeError, "mask must be bool of shape [4, 4]"),
    "mask elsewhere": (
        lambda: supcon(X, mask=torch.ones(4, 4, dtype=torch.bool, device="meta")),
        ValueError,
        "on cpu, got it on meta",
    ),
    "mask on a compiled backend": (
        lambda: supcon(X, mask=torch.eye(4, dtype=torch.bool), backend="cpu"),
        ValueError,
        "backend='cpu' knows positives by label only, not by mask; mask needs backend='tiled' or 'auto'",
    ),
    "temperature 0": (
        lambda: supcon(X, Y, temperature=0.0),
        ValueError,
        "temperature must be finite and greater than 0, got 0.0",
    ),
    "temperature below 0": (lambda: supcon(X, Y, temperature=-1), ValueError, "greater than 0, got -1"),
    "temperature nan": (
        lambda: supcon(X, Y, temperature=float("nan")),
        ValueError,
        "greater than 0, got nan",
    ),
    "temperature infinite": (
        lambda: supcon(X, Y, temperature=float("inf")),
        ValueError,
        "greater than 0, got inf",
    ),
    "temperature tensor": (
        lambda: supcon(X, Y, temperature=torch.tensor(-0.5)),
        ValueError,
        "than 0, got -0.5",
    ),
    "temperature vector": (
        lambda: supcon(X, Y, temperature=torch.ones(4)),
        TypeError,
        "temperature must be a number or a float tensor of no dimensions, got float32 of shape [4]",
    ),
    "temperature text": (lambda: supcon(X, Y, temperature="0.1"), TypeError, "no dimensions, got str '0.1'"),
    "base_temperature": (
        lambda: supcon(X, Y, base_temperature=0),
        ValueError,
        "base_temperature must be finite and greater than 0, got 0",
    ),
    "contrast_mode": (
        lambda: supcon(X, Y, contrast_mode="each"),
        ValueError,
        "contrast_mode must be one of 'all', 'one', got 'each'",
    ),
    "reduction": (
        lambda: supcon(X, Y, reduction="max"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "backend": (
        lambda: supcon(X, Y, backend="gpu"),
        ValueError,
        "backend must be one of 'auto', 'cpu', 'cuda', 'tiled', 'reference', got 'gpu'",
    ),
    "backend of another device": (
        lambda: supcon(X, Y, backend="cuda"),
        ValueError,
        "backend='cuda' needs cuda tensors, but features are on cpu",
    ),
    "one view without labels": (
        lambda: supcon(ROWS),
        ValueError,
        "labels=None takes the views of a sample as its positives, so features must be [B, V, D] with V >= 2",
    ),
    "cNCE without instances": (
        lambda: functional.class_conditional_info_nce(ROWS, Y),
        ValueError,
        "instances must be given with features of one view per sample (they say which rows are views "
        "of one sample), "
        "got features of shape [4, 3] and instances=None",
    ),
    "spread without instances": (
        lambda: functional.spread(X[:, :1], Y),
        ValueError,
        "instances must be given",
    ),
    "instances of another length": (
        lambda: functional.spread(X, Y, instances=torch.arange(8)),
        ValueError,
        "instances must be int64 of shape [B]=[4] (one per sample), got int64 of shape [8]",
    ),
    "candidates of another width": (
        lambda: supcon(X, Y, candidates=torch.randn(5, 4), candidate_labels=torch.arange(5)),
        ValueError,
        "candidates must have the width D=3 of features, got float32 of shape [5, 4]",
    ),
    "candidates elsewhere": (
        lambda: supcon(X, Y, candidates=torch.randn(5, 3, device="meta"), candidate_labels=Y),
        ValueError,
        "candidates must be on the device of features, cpu, got meta",
    ),
    "candidates without labels": (
        lambda: supcon(X, Y, candidates=ROWS),
        ValueError,
        "candidate_labels must be given when labels and candidates are",
    ),
    "candidate_labels without labels": (
        lambda: supcon(X, candidates=ROWS, candidate_labels=Y),
        ValueError,
        "candidate_labels were given without labels: give both or neither",
    ),
    "candidate_labels without candidates": (
        lambda: supcon(X, Y, candidate_labels=Y),
        ValueError,
        "candidate_labels and candidate_instances need candidates",
    ),
    "candidates to match by position": (
        lambda: supcon(X, candidates=torch.randn(5, 3)),
        ValueError,
        "without instances candidate k is matched with sample k, so candidates must hold as many "
        "samples as features, "
        "4, got 5",
    ),
    "candidate_labels of another length": (
        lambda: supcon(X, Y, candidates=torch.randn(5, 3), candidate_labels=Y),
        ValueError,
        "candidate_labels must be int64 of shape [N]=[5] (one per sample), got int64 of shape [4]",
    ),
    "epsilon": (
        lambda: functional.sincere(X, Y, epsilon=float("nan")),
        ValueError,
        "epsilon must be finite and between -10000.0 and 10000.0, got nan",
    ),
    "epsilon text": (
        lambda: functional.sincere(X, Y, epsilon="1"),
        TypeError,
        "epsilon must be a number, got str",
    ),
    "alpha": (
        lambda: functional.spread(X, Y, alpha=1.5),
        ValueError,
        "alpha must be finite and between 0.0 and 1.0, got 1.5",
    ),
    "base": (
        lambda: functional.spread(X, Y, base="triplet"),
        ValueError,
        "base must be one of 'supcon', 'sincere', got 'triplet'",
    ),
    "module temperature": (
        lambda: pysupcon.SupConLoss(0),
        ValueError,
        "temperature must be finite and greater than 0",
    ),
    "module temperature tensor": (
        lambda: pysupcon.SupConLoss(torch.tensor(0.1)),
        TypeError,
        "temperature must be a number, got a tensor; learnable_temperature=True makes it a parameter",
    ),
    "module mode": (
        lambda: pysupcon.SINCERELoss(contrast_mode="x"),
        ValueError,
        "contrast_mode must be one of",
    ),
    "module reduction": (lambda: pysupcon.SpreadLoss(reduction="x"), ValueError, "reduction must be one of"),
    "module backend": (lambda: pysupcon.SpreadLoss(backend="x"), ValueError, "backend must be one of"),
    "module alpha": (lambda: pysupcon.SpreadLoss(alpha=-0.1), ValueError, "alpha must be finite and between"),
    "module base": (lambda: pysupcon.SpreadLoss(base="x"), ValueError, "base must be one of"),
    "module epsilon": (
        lambda: pysupcon.SINCERELoss(epsilon=float("inf")),
        ValueError,
        "epsilon must be finite",
    ),
    "module gather": (
        lambda: pysupcon.SupConLoss(gather="all"),
        ValueError,
        "gather must be one of False, True, 'ring'",
    ),
    "InfoNCE with labels": (
        lambda: pysupcon.InfoNCELoss()(X, Y),
        ValueError,
        "InfoNCELoss is self-supervised: labels, mask and candidate_labels must be None",
    ),
    "gather with candidates": (
        lambda: supcon(X, Y, candidates=ROWS, candidate_labels=Y, gather=object()),
        ValueError,
        'gather works with features and labels only: no candidates, no mask, contrast_mode="all"',
    ),
    "gather on the reference": (
        lambda: supcon(X, Y, backend="reference", gather=object()),
        ValueError,
        'gather needs a streaming backend, got backend="reference"',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    call, kind, text = CASES[case]
    with pytest.raises(kind, match=re.escape(text)):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", LOSSES)
def test_features_that_are_not_finite(name: str, value: float, backend: str) -> None:
    x = torch.randn(6, 2, 4)
    x[3, 1, 2] = value
    with pytest.raises(ValueError, match="features must be finite"):
        LOSSES[name](x, torch.arange(6) % 2, backend=backend)


def test_similarities_that_overflow(backend: str) -> None:
    with pytest.raises(ValueError, match="features"):
        functional.supcon(torch.full((4, 3), 1e20), Y, backend=backend)


def test_a_backend_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "compiled_for", lambda device: False)
    monkeypatch.setattr(
        _ops, "backends", lambda: {"cpu": {"available": False, "detail": "no compiler was found"}}
    )
    with pytest.raises(RuntimeError, match="backend='cpu' is not compiled: no compiler was found"):
        supcon(X, Y, backend="cpu")
    monkeypatch.setattr(_checks, "_warned", set())
    with pytest.warns(UserWarning, match=r"no compiled kernel for cpu tensors \(no compiler was found\)"):
        first = supcon(X, Y)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert torch.equal(first, supcon(X, Y))
    assert torch.equal(first, supcon(X, Y, backend="tiled"))
