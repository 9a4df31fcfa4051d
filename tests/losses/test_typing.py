"""Keywords of the losses: mypy checks them at the call, and an unknown one is a TypeError that names it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers.cases import LOSSES
from mypy import api

import pysupcon
from pysupcon import functional

CALLS = """\
from torch import Tensor
import pysupcon
from pysupcon import functional

def right(x: Tensor, y: Tensor) -> Tensor:
    loss = pysupcon.SupConLoss(0.1, "one", 0.2, reduction="sum", gather="ring", learnable_temperature=True)
    pysupcon.SINCERELoss(0.1, 0.2, contrast_mode="one")
    pysupcon.InfoNCELoss(0.1, backend="tiled")
    functional.info_nce(x, temperature=0.1, candidates=x)
    functional.pair_statistics(x, y, normalize=True)
    return loss(x, y, candidates=x, candidate_labels=y) + functional.spread(x, y, alpha=0.3, instances=y)

def wrong(x: Tensor, y: Tensor) -> None:
    pysupcon.SupConLoss(temprature=1)
    pysupcon.SINCERELoss(reducton="sum")
    pysupcon.SpreadLoss(normalize="yes")
    pysupcon.InfoNCELoss(temperature="warm")
    pysupcon.ClassConditionalInfoNCELoss(epsilon=0.1)
    functional.supcon(x, y, reducton="sum")
    functional.sincere(x, y, epsilon="small")
    functional.class_conditional_info_nce(x, y, instance=y)
    functional.spread(x, y, contrast_mode=1)
    functional.info_nce(x, labels=y)
    functional.pair_statistics(x, y, reduction="sum")
"""
CONFIG = """\
[mypy]
disable_error_code = import-untyped, import-not-found
[mypy-torch.*]
follow_imports = skip
"""


def test_mypy_rejects_what_is_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "mypy.ini").write_text(CONFIG)  # torch is left out: reading it takes a minute
    monkeypatch.setenv("MYPYPATH", str(Path(pysupcon.__file__).parents[1]))
    arguments = ["--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache"]
    found, _, _ = api.run([*map(str, arguments), "--follow-imports=silent", str(tmp_path / "calls.py")])
    lines = {int(line) for line in re.findall(r"calls\.py:(\d+): error", found)}
    first = CALLS.splitlines().index("def wrong(x: Tensor, y: Tensor) -> None:") + 2
    assert lines == set(range(first, len(CALLS.splitlines()) + 1)), found


X, Y = torch.randn(4, 2, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_keyword_of_a_function(name: str) -> None:
    with pytest.raises(TypeError, match=r"^\w+\(\) got an unexpected keyword argument 'reducton'"):
        LOSSES[name](X, Y, reducton="sum")


def test_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        pysupcon.SupConLoss(temprature=1)  # type: ignore[call-arg]
    for name, value in (("candidate", X), ("reduction", "sum"), ("base_temperature", 1.0)):
        words = rf"SpreadLoss.forward\(\) got an unexpected keyword argument '{name}'"
        with pytest.raises(TypeError, match=words):
            pysupcon.SpreadLoss()(X, Y, **{name: value})
    for argument in ("labels", "candidate_labels", "epsilon"):
        with pytest.raises(TypeError, match=rf"info_nce\(\) got an unexpected keyword argument '{argument}'"):
            functional.info_nce(X, **{argument: Y})
    with pytest.raises(
        TypeError, match=r"pair_statistics\(\) got an unexpected keyword argument 'reduction'"
    ):
        functional.pair_statistics(X, Y, reduction="sum")  # type: ignore[call-arg]


ROWS = [
    "candidates", "instances", "candidate_instances", "memory", "memory_instances", "memory_weights",
    "exclude_batch_from_memory", "hard_negatives", "candidate_labels", "memory_labels", "candidate_weights",
    "anchor_weights",
]  # fmt: skip
OF_LABELS = {"candidate_labels", "memory_labels"}
"""Of these, what a self-supervised loss does not take"""
COMPUTATION = ["contrast_mode", "normalize", "backend", "gather", "batch_negatives"]
LABELLING = {"class_balance": False, "ignore_index": None, "unlabeled": "ignore"}
MANY_LABELS = {"multi_label": "per_label", "overlap_threshold": 0.0}


@pytest.mark.parametrize("name", pysupcon.losses.LOSSES_BY_NAME)
def test_signatures_name_every_keyword(name: str) -> None:
    """For `help`, editors, and code that filters its keywords by the signature."""
    loss = pysupcon.losses.LOSSES_BY_NAME[name]
    forward = inspect.signature(loss.forward).parameters
    assert list(forward) == ["self", "features", "labels", "mask", *ROWS]
    given = {keyword: forward[keyword].default for keyword in ROWS}
    assert given == {**dict.fromkeys(ROWS), "exclude_batch_from_memory": False}
    found = inspect.signature(loss).parameters
    shared = {
        "contrast_mode": "all",
        "reduction": "mean",
        "normalize": False,
        "gather": False,
        "backend": "auto",
    }
    shared |= {"learnable_temperature": False, "min_temperature": None, "max_temperature": None}
    shared |= {"batch_negatives": True, **LABELLING, **MANY_LABELS}
    assert {keyword: found[keyword].default for keyword in shared} == shared
    assert set(found) == {"temperature", *shared, *loss.own_parameters}
    function = inspect.signature(loss.function).parameters
    labels = () if loss.self_supervised else ("labels", "mask", *OF_LABELS, *LABELLING, *MANY_LABELS)
    own = {"features", "temperature", "reduction", *labels, *loss.own_parameters}
    assert set(function) == own | {*ROWS, *COMPUTATION} - (OF_LABELS if loss.self_supervised else set())
    assert function["contrast_mode"].default == "all"
    assert function["gather"].default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in [*forward.values(), *found.values(), *function.values()])


@pytest.mark.parametrize("name", [name for name in pysupcon.__all__ if name.endswith("Loss")])
def test_help_explains_every_argument(name: str) -> None:
    loss = getattr(pysupcon, name)
    for function in (loss.__init__, loss.forward, loss.function):
        text = inspect.getdoc(function)
        assert text is not None
        summary, _, arguments = text.partition("\nArgs:\n")
        assert summary
        explained = re.findall(r"^    (\w+): \S", arguments, flags=re.MULTILINE)
        assert sorted(explained) == sorted(inspect.signature(function).parameters.keys() - {"self"})


def test_the_signature_of_the_statistics() -> None:
    found = inspect.signature(functional.pair_statistics).parameters
    keywords = {*ROWS, *COMPUTATION, *LABELLING, *MANY_LABELS}
    assert set(found) == {"features", "labels", "mask", "temperature", *keywords}
    with pytest.raises(TypeError, match="anchor_weights"):  # they belong to a reduction
        functional.pair_statistics(torch.eye(2), torch.tensor([0, 0]), anchor_weights=torch.ones(2))
