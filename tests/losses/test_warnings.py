"""A warning shows the line of the user's code that calls the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pysupcon
from pysupcon import compat, contrastive, functional
from pysupcon.pairs import arguments, backends, ops

X = torch.eye(4)
LABELS = torch.arange(4)
CALLS: dict[str, Callable[[], Any]] = {
    "function": lambda: functional.supcon(X, LABELS),
    "function without a graph": lambda: torch.no_grad()(functional.supcon)(X, LABELS),
    "module": lambda: pysupcon.SupConLoss()(X, LABELS),
    "module within modules": lambda: torch.nn.Sequential(pysupcon.InfoNCELoss())(torch.zeros(0, 2, 4)),
    "cNCE": lambda: pysupcon.ClassConditionalInfoNCELoss()(X, LABELS, instances=LABELS),
    "SupContrast": lambda: compat.SupConLoss()(X[:1, None]),
    "SINCERE": lambda: compat.SINCERELoss()(X, LABELS),
    "pytorch-metric-learning": lambda: compat.MetricLearningSupConLoss()(X, LABELS),
}


def assert_here(call: Callable[[], Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    line = call.__code__.co_firstlineno
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]


@pytest.mark.parametrize("name", CALLS)
def test_no_positive(name: str) -> None:
    assert_here(CALLS[name], "no anchor of this batch has a positive")


@pytest.mark.parametrize("name", ["function", "module", "pair_statistics", "compat"])
def test_no_compiled_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled_for", lambda device: False)
    monkeypatch.setattr(backends, "_warned", set())
    same = LABELS // 2
    calls: dict[str, Callable[[], Any]] = {
        "function": lambda: functional.supcon(X, same),
        "module": lambda: pysupcon.SupConLoss()(X, same),
        "pair_statistics": lambda: functional.pair_statistics(X, same),
        "compat": lambda: compat.SINCERELoss()(X, same),
    }
    assert_here(calls[name], "no compiled kernel for cpu tensors")


@pytest.mark.parametrize("labelled", [False, True])
def test_candidates_that_may_be_negatives(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_warned", set())
    x, own, same = torch.randn(4, 5), torch.randn(4, 3, 5), torch.arange(4) // 2
    labels = {"labels": same, "candidate_labels": same} if labelled else {}
    text = r"candidates of shape \[4, 3, 5\] are taken as 3 views .* features have 1 .* hard_negatives"
    assert_here(lambda: functional.supcon(x, candidates=own, **labels), text)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.supcon(x, candidates=own)  # once
        monkeypatch.setattr(arguments, "_warned", set())
        functional.supcon(own, candidates=own)  # as many views as the features
        functional.supcon(x, candidates=x)
        functional.supcon(x, same, candidates=own, candidate_labels=same.clone())  # labels of their own
        functional.supcon(x, same, candidates=own[:3], candidate_labels=same[:3])
        functional.supcon(x, mask=same[:, None] == same, candidates=own)


def test_rows_that_are_far_from_unit_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_warned", set())
    far, same = 10 * X, LABELS // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pysupcon.SupConLoss(normalize=True)(far, same)
        pysupcon.SupConLoss()(X, same)
        functional.supcon(far, same)  # only modules warn
        torch.compile(pysupcon.SupConLoss(), backend="eager", fullgraph=True)(far, same)
    text = "features have a mean norm of 10, and SupConLoss does not normalise them: pass normalize=True"
    assert_here(lambda: pysupcon.SupConLoss()(far, same), text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pysupcon.SupConLoss()(far, same)  # once
    monkeypatch.setattr(arguments, "_warned", set())
    assert_here(
        lambda: pysupcon.InfoNCELoss()(far.view(2, 2, 4) / 100), "a mean norm of 0.1, and InfoNCELoss"
    )


def test_a_module_looks_at_the_norms_of_its_first_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(contrastive, "warn_of_norms", lambda name, features: calls.append(name))
    loss = pysupcon.HierarchicalSupConLoss([1.0])
    for _ in range(3):
        loss(X, [LABELS // 2])
    assert calls == ["HierarchicalSupConLoss"]
