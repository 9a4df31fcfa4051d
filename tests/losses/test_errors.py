"""Invalid input: each error names the argument, the requirement and the value."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import LOSSES
from torch import Tensor

import pysupcon
from pysupcon import compat, functional
from pysupcon.distributed import AllGather
from pysupcon.pairs import backends, checks, ops

X = torch.randn(4, 2, 3)
ROWS = torch.randn(4, 3)
Y = torch.tensor([0, 1, 0, 1])
supcon = functional.supcon

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "features not a tensor": (
        lambda: supcon([[1.0]], Y),
        TypeError,
        "features must be a float tensor of shape [N, D] or [B, V, D], got list of length 1 "
        "(first element: list of length 1 (first element: float))",
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
        "labels must be integers of shape [B]=[4] (one per sample), got float32 of shape [4]",
    ),
    "boolean labels": (lambda: supcon(X, Y.bool()), ValueError, "got bool of shape [4]"),
    "labels of another length": (
        lambda: supcon(ROWS, Y[:3]),
        ValueError,
        "labels must be integers of shape [N]=[4] (one per sample), got int64 of shape [3]",
    ),
    "labels as a column": (lambda: supcon(X, Y[:, None]), ValueError, "got int64 of shape [4, 1]"),
    "labels as a list": (
        lambda: supcon(X, [0, 1, 0, 1]),
        TypeError,
        "labels must be integers of shape [B]=[4] (one per sample), got list of length 4 (first element: "
        "int): convert it with torch.tensor",
    ),
    "labels as an array": (
        lambda: supcon(X, Y.numpy()),
        TypeError,
        "got ndarray of int64, shape [4]: convert it with torch.from_numpy",
    ),
    "features as an array": (
        lambda: supcon(X.numpy(), Y),
        TypeError,
        "got ndarray of float32, shape [4, 2, 3]: convert it with torch.from_numpy",
    ),
    "labels elsewhere": (
        lambda: supcon(X, Y.to("meta")),
        ValueError,
        "labels must be integers of shape [B]=[4] (one per sample) on cpu, got it on meta",
    ),
    "labels and mask": (
        lambda: supcon(X, Y, torch.ones(4, 4, dtype=torch.bool)),
        ValueError,
        "labels and mask both define the positives: give only one of them",
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
        "backend='cpu' supports positives by label only, not by mask; mask needs backend='tiled' or 'auto'",
    ),
    "temperature 0": (
        lambda: supcon(X, Y, temperature=0.0),
        ValueError,
        "temperature must be from 1e-12 to 1e+12, got 0.0",
    ),
    "temperature below 0": (
        lambda: supcon(X, Y, temperature=-1),
        ValueError,
        "from 1e-12 to 1e+12, got int -1",
    ),
    "temperature nan": (
        lambda: supcon(X, Y, temperature=float("nan")),
        ValueError,
        "from 1e-12 to 1e+12, got nan",
    ),
    "temperature infinite": (
        lambda: supcon(X, Y, temperature=float("inf")),
        ValueError,
        "from 1e-12 to 1e+12, got inf",
    ),
    "temperature tensor": (
        lambda: supcon(X, Y, temperature=torch.tensor(-0.5)),
        ValueError,
        "from 1e-12 to 1e+12, got -0.5",
    ),
    "temperature vector": (
        lambda: supcon(X, Y, temperature=torch.ones(4)),
        TypeError,
        "temperature must be a number or a tensor of one element, got float32 of shape [4]",
    ),
    "temperature text": (lambda: supcon(X, Y, temperature="0.1"), TypeError, "of one element, got str '0.1'"),
    "base_temperature": (
        lambda: supcon(X, Y, base_temperature=0),
        ValueError,
        "base_temperature must be from 1e-12 to 1e+12, got int 0",
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
        "the loss must know which rows are views of one sample: stack the views to features [B, V, D] with "
        "V >= 2, or pass instances (one integer per row, equal for views of one sample), "
        "got features of shape [4, 3] and instances=None",
    ),
    "spread without instances": (
        lambda: functional.spread(X[:, :1], Y),
        ValueError,
        "stack the views to features [B, V, D] with V >= 2, or pass instances",
    ),
    "instances of another length": (
        lambda: functional.spread(X, Y, instances=torch.arange(8)),
        ValueError,
        "instances must be integers of shape [B]=[4] (one per sample), got int64 of shape [8]",
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
        "candidate_labels must be integers of shape [N]=[5] (one per sample), got int64 of shape [4]",
    ),
    "epsilon": (
        lambda: functional.sincere(X, Y, epsilon=float("nan")),
        ValueError,
        "epsilon must be from -10000 to 10000, got nan",
    ),
    "epsilon text": (
        lambda: functional.sincere(X, Y, epsilon="1"),
        TypeError,
        "epsilon must be a number or a tensor of one element, got str",
    ),
    "epsilon with a gradient": (
        lambda: functional.sincere(X, Y, epsilon=torch.tensor(0.1, requires_grad=True)),
        TypeError,
        "epsilon is not differentiable: pass epsilon.detach()",
    ),
    "temperature too small": (
        lambda: supcon(X, Y, temperature=1e-30),
        ValueError,
        "temperature must be from 1e-12 to 1e+12, got 1e-30",
    ),
    "temperature too large": (
        lambda: supcon(X, Y, temperature=torch.tensor([1e30], dtype=torch.float64)),
        ValueError,
        "temperature must be from 1e-12 to 1e+12, got 1e+30",
    ),
    "boolean temperature": (
        lambda: supcon(X, Y, temperature=torch.tensor(True)),
        TypeError,
        "a tensor of one element, got bool of shape []",
    ),
    "alpha": (
        lambda: functional.spread(X, Y, alpha=1.5),
        ValueError,
        "alpha must be from 0 to 1, got 1.5",
    ),
    "base": (
        lambda: functional.spread(X, Y, base="triplet"),
        ValueError,
        "base must be one of 'supcon', 'sincere', got 'triplet'",
    ),
    "module temperature": (
        lambda: pysupcon.SupConLoss(0),
        ValueError,
        "temperature must be from 1e-12 to 1e+12, got int 0",
    ),
    "module temperature tensor": (
        lambda: pysupcon.SupConLoss(torch.tensor(0.1, requires_grad=True)),
        TypeError,
        "temperature must be a number, got a tensor with requires_grad=True; learnable_temperature=True "
        "makes it a parameter of the loss",
    ),
    "module mode": (
        lambda: pysupcon.SINCERELoss(contrast_mode="x"),
        ValueError,
        "contrast_mode must be one of",
    ),
    "module reduction": (lambda: pysupcon.SpreadLoss(reduction="x"), ValueError, "reduction must be one of"),
    "module backend": (lambda: pysupcon.SpreadLoss(backend="x"), ValueError, "backend must be one of"),
    "module alpha": (lambda: pysupcon.SpreadLoss(alpha=-0.1), ValueError, "alpha must be from 0 to 1"),
    "module base": (lambda: pysupcon.SpreadLoss(base="x"), ValueError, "base must be one of"),
    "module epsilon": (
        lambda: pysupcon.SINCERELoss(epsilon=float("inf")),
        ValueError,
        "epsilon must be from -10000 to 10000, got inf",
    ),
    "module gather": (
        lambda: pysupcon.SupConLoss(gather="all"),
        ValueError,
        "gather must be one of False, True, 'ring'",
    ),
    "module gather of another kind": (
        lambda: pysupcon.SupConLoss(gather=1),
        TypeError,
        "gather must be an object with a method begin (pysupcon.functional.Gather; of a module also False, "
        "True or 'ring'), got int 1",
    ),
    "gather of another kind": (lambda: supcon(X, Y, gather="ring"), TypeError, "got str 'ring'"),
    "InfoNCE with labels": (
        lambda: pysupcon.InfoNCELoss()(X, Y),
        ValueError,
        "InfoNCELoss is self-supervised: labels, mask, candidate_labels and memory_labels must be None",
    ),
    "gather with a mask": (
        lambda: supcon(X, mask=torch.eye(len(X), dtype=torch.bool), gather=AllGather()),
        ValueError,
        "gather works with labels and instances, not with a mask: mask must be None",
    ),
    "gather on the reference": (
        lambda: supcon(X, Y, backend="reference", gather=AllGather()),
        ValueError,
        'gather needs a streaming backend, got backend="reference"',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    call, kind, text = CASES[case]
    with pytest.raises(kind, match=re.escape(text)):
        call()


class _Verbose:
    def __repr__(self) -> str:
        return "many words\n" * 10_000


HUGE: dict[str, Any] = {
    "list": list(range(30_000)),
    "list of lists": [list(range(100))] * 300,
    "list of tensors": [torch.zeros(30_000)] * 3,
    "tuple": (0.5,) * 30_000,
    "dict": {number: str(number) for number in range(30_000)},
    "set": set(range(30_000)),
    "array": np.arange(30_000),
    "array of text": np.array(["x" * 30_000]),
    "text": "x" * 30_000,
    "bytes": b"x" * 30_000,
    "number": 10**30_000,
    "tensor": torch.zeros(30_000, 2, 2, 2),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "object": _Verbose(),
    "type": type("A" * 30_000, (), {}),
}
ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "features": lambda value: supcon(value, Y),
    "labels": lambda value: supcon(X, value),
    "mask": lambda value: supcon(X, mask=value),
    "candidates": lambda value: supcon(X, Y, candidates=value, candidate_labels=Y),
    "candidate_labels": lambda value: supcon(X, Y, candidates=ROWS, candidate_labels=value),
    "instances": lambda value: functional.spread(X, Y, instances=value),
    "temperature": lambda value: supcon(X, Y, temperature=value),
    "base_temperature": lambda value: supcon(X, Y, base_temperature=value),
    "epsilon": lambda value: functional.sincere(X, Y, epsilon=value),
    "alpha": lambda value: functional.spread(X, Y, alpha=value),
    "base": lambda value: functional.spread(X, Y, base=value),
    "reduction": lambda value: supcon(X, Y, reduction=value),
    "contrast_mode": lambda value: supcon(X, Y, contrast_mode=value),
    "backend": lambda value: supcon(X, Y, backend=value),
    "module temperature": lambda value: pysupcon.SupConLoss(value),
    "module base_temperature": lambda value: pysupcon.SupConLoss(base_temperature=value),
    "module gather": lambda value: pysupcon.SupConLoss(gather=value),
    "gather": lambda value: supcon(X, Y, gather=value),
    "compat features": lambda value: compat.SupConLoss()(value, Y),
    "compat labels": lambda value: compat.SupConLoss()(X, value),
    "compat mask": lambda value: compat.SupConLoss()(X, mask=value),
    "compat mode": lambda value: compat.SupConLoss(contrast_mode=value)(X, Y),
    "compat temperature": lambda value: compat.SupConLoss(value)(X, Y),
    "compat embeds": lambda value: compat.SINCERELoss()(value, Y),
    "compat embeds labels": lambda value: compat.SINCERELoss()(ROWS, value),
    "compat views": lambda value: compat.InfoNCELoss()(value),
    "compat epsilon": lambda value: compat.EpsSupInfoNCELoss(epsilon=value)(ROWS, Y),
    "compat embeddings": lambda value: compat.MetricLearningSupConLoss()(value, Y),
    "compat embeddings labels": lambda value: compat.MetricLearningSupConLoss()(ROWS, value),
    "compat ref_labels": lambda value: compat.MetricLearningSupConLoss()(ROWS, Y, None, ROWS, value),
    "compat distance": lambda value: compat.MetricLearningSupConLoss(distance=value),
    "compat reducer": lambda value: compat.MetricLearningSupConLoss(reducer=value),
    "compat regularizer": lambda value: compat.MetricLearningSupConLoss(embedding_regularizer=value),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_wrong_value_is_described_and_not_printed(argument: str) -> None:
    for kind, value in HUGE.items():
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            ARGUMENTS[argument](value)
        message = str(caught.value)
        assert len(message) < 300, f"{kind}: {len(message)} characters: {message[:400]}"
        assert "\n" not in message, kind


def test_what_a_description_says() -> None:
    said = {
        "list of length 30000 (first element: int)": HUGE["list"],
        "list of length 300 (first element: list of length 100 (first element: int))": HUGE["list of lists"],
        "list of length 3 (first element: float32 of shape [30000])": HUGE["list of tensors"],
        "dict of length 30000 (first element: int)": HUGE["dict"],
        "ndarray of int64, shape [30000]": HUGE["array"],
        "int of 99658 bits": HUGE["number"],
        "list of length 0": [],
        "str 'cosine'": "cosine",
        "None": None,
        "float 0.5": 0.5,
    }
    assert {checks.describe(value) for value in said.values()} == set(said)
    assert checks.describe(HUGE["text"]).startswith("str of length 30000, 'xxx")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", LOSSES)
def test_features_that_are_not_finite(name: str, value: float, backend: str) -> None:
    x = torch.randn(6, 2, 4)
    x[3, 1, 2] = value
    with pytest.raises(ValueError, match="features must be finite"):
        LOSSES[name](x, torch.arange(6) % 2, backend=backend)


@pytest.mark.parametrize("n", [257, 512, 1024])
def test_one_number_that_is_not_finite_is_found_in_any_row(n: int, backend: str) -> None:
    """Maxima are taken over parts of the rows, and a comparison with NaN is always false."""
    x = F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1)
    labels = torch.arange(n) % 7
    labels[n // 3] = 7  # alone in its class: no sum over positives visits this row
    spread = {0, 1, 63, 64, 255, 256, n // 3, n // 2, n - 2, n - 1, *range(5, n, 41)}
    for row in spread:
        broken = x.clone()
        broken[row, row % 8] = (torch.nan, torch.inf, -torch.inf)[row % 3]
        for arguments in ((broken, labels), (x, labels, broken, labels)):
            with pytest.raises(ValueError, match=rf"features must be finite.* row {row}\b"):
                _supcon_with_candidates(*arguments, backend=backend)


def _supcon_with_candidates(
    x: Tensor, labels: Tensor, candidates: Tensor | None = None, theirs: Tensor | None = None, *, backend: str
) -> Tensor:
    return functional.supcon(x, labels, candidates=candidates, candidate_labels=theirs, backend=backend)


def test_similarities_that_overflow(backend: str) -> None:
    with pytest.raises(ValueError, match="features"):
        functional.supcon(torch.full((4, 3), 1e20), Y, backend=backend)


def test_a_backend_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled_for", lambda device: False)
    monkeypatch.setattr(
        backends, "backends", lambda: {"cpu": {"available": False, "detail": "no compiler was found"}}
    )
    with pytest.raises(RuntimeError, match="backend='cpu' is not compiled: no compiler was found"):
        supcon(X, Y, backend="cpu")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match=r"no compiled kernel for cpu tensors \(no compiler was found\)"):
        first = supcon(X, Y)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert torch.equal(first, supcon(X, Y))
    assert torch.equal(first, supcon(X, Y, backend="tiled"))


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_a_memory_that_is_not_finite_is_named(backend: str) -> None:
    memory = torch.ones(3, 3)
    memory[1, 0] = torch.nan
    text = "^memory must be finite, got NaN or infinity in 1 of 3 rows, the first of them row 1$"
    with pytest.raises(ValueError, match=text):
        supcon(ROWS, Y, memory=memory, memory_labels=Y[:3], backend=backend)
    with pytest.raises(
        ValueError, match=r"^features must be finite, got NaN or infinity in 1 of 3 candidate"
    ):
        supcon(ROWS, Y, candidates=memory, candidate_labels=Y[:3], backend=backend)
