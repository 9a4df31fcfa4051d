"""contrastive_metrics against its definition, pair by pair in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pysupcon import functional
from pysupcon.pairs import slicing

B, V, D = 7, 2, 5
LABELS = torch.tensor([3, -1, 3, 0, 3, 7, 0])  # 7 and -1 have their own second view only


def _definition(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    contrast_mode: str = "all",
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    instances: Tensor | None = None,
    candidate_instances: Tensor | None = None,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    memory_weights: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    batch_negatives: bool = True,
    ignore_index: int | None = None,
    unlabeled: str = "ignore",
) -> list[float]:
    """[accuracy, mean similarity of positives, of negatives]."""
    x = features if features.dim() == 3 else features[:, None]
    c = x if candidates is None else candidates if candidates.dim() == 3 else candidates[:, None]
    ids = labels if labels is not None else instances if instances is not None else torch.arange(len(x))
    other = candidate_labels if labels is not None else candidate_instances
    other = ids if candidates is None else torch.arange(len(c)) if other is None else other
    correct: list[bool] = []
    sums: dict[bool, list[float]] = {True: [], False: []}
    for b, v in [(b, v) for b in range(len(x)) for v in range(x.shape[1])]:
        if contrast_mode == "one" and v > 0:
            continue
        found: dict[bool, list[float]] = {True: [], False: []}
        unknown = ignore_index is not None and ids[b] == ignore_index
        if unknown and unlabeled == "ignore":
            continue
        for b2, v2 in [(b, v) for b in range(len(c)) for v in range(c.shape[1])]:
            if candidates is None and (b, v) == (b2, v2):
                continue
            if ignore_index is not None and other[b2] == ignore_index and unlabeled == "ignore":
                continue
            if mask is not None:
                positive = bool(mask[b, b2])
            elif ids.dim() == 2:  # labels [B, C]: a label in common
                positive = bool((ids[b] & other[b2]).any())
            else:
                positive = bool(ids[b] == other[b2])
            if unknown:
                positive = b == b2
            if positive or batch_negatives:
                found[positive].append(float(x[b, v].double() @ c[b2, v2].double()))
        for k, row in enumerate([] if memory is None else memory):
            if (memory_weights is None or memory_weights[k] > 0) and (
                ignore_index is None or memory_labels is None or memory_labels[k] != ignore_index
            ):
                positive = memory_labels is not None and bool(ids[b] == memory_labels[k])
                found[positive].append(float(x[b, v].double() @ row.double()))
        for row in [] if hard_negatives is None else hard_negatives[b]:
            found[False].append(float(x[b, v].double() @ row.double()))
        if found[True]:
            correct.append(max(found[True]) > max(found[False], default=-math.inf))
            for kind in (True, False):
                sums[kind] += found[kind]
    lists: list[list[Any]] = [correct, sums[True], sums[False]]
    return [math.fsum(values) / len(values) if values else math.nan for values in lists]


def _options(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    queue = torch.randn(6, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, B, generator=generator) < 0.4
    mask[2], mask[3] = False, True  # an anchor without a positive, and one without a negative
    candidates = {"candidates": queue, "candidate_labels": torch.tensor([3, 3, 0, 7, 8, 3])}
    memory = {
        "memory": torch.randn(6, D, generator=generator, dtype=torch.float64),
        "memory_labels": torch.tensor([3, 0, 5, 7, 3, -1]),
        "memory_weights": torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, 0.5]),
    }
    several = torch.rand(B, 3, generator=generator) < 0.4
    several[4] = False
    own = torch.randn(B, 3, D, generator=generator, dtype=torch.float64)
    return {
        "labels": {"labels": LABELS},
        "views": {},
        "mask": {"mask": mask},
        "one": {"labels": LABELS, "contrast_mode": "one"},
        "one mask": {"mask": mask, "contrast_mode": "one"},
        "instances": {"instances": torch.tensor([4, 1, 4, 2, 9, 3, 5])},
        "labels and instances": {"labels": LABELS, "instances": torch.arange(B) // 2},
        "candidates": {"labels": LABELS, **candidates},
        "candidates one": {"labels": LABELS, "contrast_mode": "one", **candidates},
        "candidates with views": {
            "labels": LABELS,
            "candidates": queue.view(3, 2, D),
            "candidate_labels": torch.tensor([3, 0, 8]),
        },
        "candidates mask": {"mask": mask[:, :6], "candidates": queue},
        "candidates by position": {"candidates": torch.randn(B, D, generator=generator, dtype=torch.float64)},
        "candidates by instance": {
            "candidates": queue,
            "instances": torch.arange(B),
            "candidate_instances": torch.tensor([0, 0, 3, 5, 9, 2]),
        },
        "memory": {"labels": LABELS, **memory},
        "memory alone has positives": {
            "labels": torch.arange(B),
            **memory,
            "memory_labels": torch.arange(6) + 2,
        },
        "memory without labels": {"memory": queue},
        "memory and candidates": {"labels": LABELS, **candidates, **memory},
        "hard negatives": {"labels": LABELS, "hard_negatives": own},
        "positives of the batch only": {
            "labels": LABELS,
            "batch_negatives": False,
            **memory,
            "hard_negatives": own,
        },
        "ignored": {"labels": LABELS, "ignore_index": 3},
        "ignored everywhere": {"labels": LABELS, **candidates, **memory, "ignore_index": 3},
        "ignored one": {"labels": LABELS, "ignore_index": 3, "contrast_mode": "one"},
        "unlabelled instances": {"labels": LABELS, "ignore_index": 3, "unlabeled": "instance"},
        "several labels": {"labels": several},
        "several labels one": {"labels": several, "contrast_mode": "one", "hard_negatives": own},
        "several labels and candidates": {
            "labels": several,
            "candidates": queue,
            "candidate_labels": several[:6].flip(0),
        },
        "no candidates": {
            "labels": LABELS,
            "candidates": queue[:0],
            "candidate_labels": torch.zeros(0, dtype=torch.int64),
        },
    }[kind]


KINDS = [
    "labels", "views", "mask", "one", "one mask", "instances", "labels and instances", "candidates",
    "candidates one", "candidates with views", "candidates mask", "candidates by position",
    "candidates by instance", "no candidates", "memory", "memory alone has positives",
    "memory without labels", "memory and candidates", "hard negatives", "positives of the batch only",
    "ignored", "ignored everywhere", "ignored one", "unlabelled instances", "several labels",
    "several labels one",
    "several labels and candidates",
]  # fmt: skip


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "_CPU_TILE", tile)
    options = _options(kind)
    features = torch.randn(B, V, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    features = features.to(dtype).requires_grad_()
    for name in options.keys() & {"candidates", "memory", "hard_negatives"}:
        options[name] = options[name].to(dtype)
    got = functional.contrastive_metrics(features, **options)
    # The inputs are rounded before. Float32 results have 24 bits; no two similarities are as close.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    truth = _definition(features.detach(), **options)
    assert [value.item() for value in got] == pytest.approx(truth, abs=tolerance, nan_ok=True)
    for value in got:
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == ()
        assert not value.requires_grad
    accuracy = functional.contrastive_accuracy(features, **options)
    assert torch.equal(accuracy, got.accuracy) or (accuracy.isnan() and got.accuracy.isnan())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_properties(seed: int, rows: int, classes: int, normalize: bool) -> None:
    """The order of the rows and the numbers of the classes do not matter; the accuracy does not depend on a
    scale of the rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    found = functional.contrastive_metrics(x, y, normalize=normalize)
    order = torch.randperm(rows, generator=generator)
    moved = functional.contrastive_metrics(x[order], 100 - 7 * y[order], normalize=normalize)
    torch.testing.assert_close(moved, found, rtol=0, atol=1e-12, equal_nan=True)
    scaled = functional.contrastive_metrics(3 * x, y, normalize=normalize)
    torch.testing.assert_close(scaled.accuracy, found.accuracy, equal_nan=True)
    factor = 1.0 if normalize else 9.0
    for before, after in zip(found[1:], scaled[1:], strict=True):
        torch.testing.assert_close(after, factor * before, rtol=0, atol=1e-12, equal_nan=True)
    if not found.accuracy.isnan():
        assert 0 <= found.accuracy <= 1


def test_tie_is_an_error() -> None:
    same = torch.ones(4, 3)
    assert functional.contrastive_accuracy(same, torch.tensor([0, 0, 1, 1])) == 0  # collapsed embeddings
    assert functional.contrastive_accuracy(same, torch.tensor([0, 0, 0, 0])) == 1  # no negative


def test_no_positive() -> None:
    metrics = functional.contrastive_metrics(torch.eye(3), torch.arange(3))
    assert all(value.isnan() for value in metrics)


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                self.numbers = max(self.numbers, value.numel() if isinstance(value, Tensor) else 0)
            return result

    monkeypatch.setattr(slicing, "_CPU_TILE", 64)
    with Largest() as largest:
        functional.contrastive_metrics(torch.ones(1024, 8), torch.arange(1024) % 300)
    assert largest.numbers <= 1025 * 8  # one more sum of rows than there can be classes


def test_autocast_does_not_round() -> None:
    x = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    y = torch.arange(40) % 5
    with torch.autocast("cpu", torch.bfloat16):
        inside = functional.contrastive_metrics(x, y)
    assert inside == functional.contrastive_metrics(x, y)


def test_errors() -> None:
    x, y = torch.eye(4), torch.tensor([0, 0, 1, 1])
    bad = x.clone()
    bad[2, 1] = torch.nan
    for name in ("temperature", "reduction", "backend", "gather", "candidate_weights", "class_balance"):
        with pytest.raises(TypeError, match=rf"contrastive_metrics\(\) got an unexpected .* '{name}'"):
            functional.contrastive_metrics(x, y, **{name: "x"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity in 1 of 4 rows"):
        functional.contrastive_accuracy(bad, y)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \[N\]=\[4\]"):
        functional.contrastive_accuracy(x, y[:3])
