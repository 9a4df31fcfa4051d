"""Evaluators of the user, and list options of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pysupcon.config import Config, parse_args
from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators import (
    EvaluationConfig,
    FeatureSet,
    FeatureSplits,
    build_evaluators,
    names_and_objects,
    unit_of,
)
from pysupcon.reading import join_lists, list_options

SOURCE = """
import torch


class Margin:
    name = "margin"
    units = {"mean": "cosine"}

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, splits, *, progress=False):
        yield "mean", self.scale * splits.test.features.mean()
        yield "margin/accuracy", 0.5
        yield "correct", torch.ones(len(splits.test), dtype=torch.bool)


def width(splits, factor=1):
    return {"dimensions": factor * splits.test.features.shape[1]}


def shape(splits):
    yield "rows", torch.zeros(3, 2)


def words(splits):
    yield "text", "many"


def numbers(splits):
    return [1, 2]


def one_number(splits):
    return 3.5


def no_name(splits):
    return {"": 1}


def two_lines(splits):
    return {"a\\nb": 1}


def twice(splits):
    yield "same", torch.zeros(len(splits.test))
    yield "same", torch.ones(len(splits.test))


def raises(splits):
    return {}["nothing"]


def raises_later(splits):
    yield "first", 1
    yield "second", int("oops")


def in_place(splits):
    splits.test.features.zero_()
    return {"sum": splits.test.features.sum()}


def labels(splits):
    return {"fine": torch.zeros(len(splits.test))}


class Slash:
    name = "my/own"

    def __call__(self, splits):
        return {"a": 1}


class Nameless(Slash):
    name = ""


class Number(Slash):
    name = 3


def knn(splits):
    return {}


constant = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_evaluators.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def splits() -> FeatureSplits:
    part = FeatureSet(torch.full((4, 2), 0.25), torch.arange(4) % 2, torch.arange(4))
    return FeatureSplits(part, part, part)


def configured(*names: str, **arguments: dict[str, object]) -> EvaluationConfig:
    return EvaluationConfig(
        evaluators=[f"own_evaluators:{name}" for name in names],
        evaluator_args={f"own_evaluators:{name}": given for name, given in arguments.items()},  # type: ignore[misc]
    )


def test_a_class_and_a_function_with_arguments() -> None:
    built = build_evaluators(configured("Margin", "width", Margin={"scale": 2.0}, width={"factor": 3}))
    results = [result for evaluator in built for result in evaluator(splits())]
    assert [name for name, _ in results] == [
        "margin/mean", "margin/accuracy", "margin/correct", "width/dimensions",
    ]  # fmt: skip
    assert [value for _, value in results if not isinstance(value, torch.Tensor)] == [0.5, 0.5, 6.0]
    assert unit_of("margin/mean", built) == "cosine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", r"own_evaluators:shape: rows must be a number or a tensor of 4 outcomes.*shape \[3, 2\]"),
        ("words", "own_evaluators:words: text must be a number or a tensor, got 'many'"),
        ("numbers", r"own_evaluators:numbers must return a dict, or .* pairs \(name, value\), got 1"),
        ("one_number", r"own_evaluators:one_number must return a dict, or .* pairs \(name, value\), got 3.5"),
        ("no_name", "own_evaluators:no_name: the name of a result must be one line of text, got ''"),
        (
            "two_lines",
            r"own_evaluators:two_lines: the name of a result must be one line of text, got 'a\\nb'",
        ),
        ("twice", "own_evaluators:twice: the result same came twice"),
        ("raises", "^evaluator own_evaluators:raises failed: KeyError: 'nothing'$"),
        (
            "raises_later",
            "^evaluator own_evaluators:raises_later failed: ValueError: invalid literal for int",
        ),
    ],
)
def test_results_that_are_refused(name: str, message: str) -> None:
    (evaluator,) = build_evaluators(configured(name))
    with pytest.raises(RunError, match=message):
        list(evaluator(splits()))


def test_configs_that_are_refused() -> None:
    for config, message in (
        (configured("knn"), "evaluation.evaluators: the name knn is taken"),
        (configured("constant"), "own_evaluators:constant must be callable with FeatureSplits, got int"),
        (
            configured("Margin", Margin={"size": 1}),
            "evaluator_args {'size': 1} do not fit own_evaluators:Margin: ",
        ),
        (
            configured("width", width={"size": 1}),
            "evaluator_args {'size': 1} do not fit own_evaluators:width: ",
        ),
        (configured("none"), "evaluation.evaluators=own_evaluators:none cannot be imported"),
        (configured("labels"), "name of own_evaluators:labels must be .*, got 'labels'"),
        (configured("Slash"), "name of own_evaluators:Slash must be .*, got 'my/own'"),
        (configured("Nameless"), "name of own_evaluators:Nameless must be .*, got ''"),
        (configured("Number"), "name of own_evaluators:Number must be .*, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_evaluators(config)
    with pytest.raises(ValueError, match="evaluator_args must hold arguments of own evaluators"):
        EvaluationConfig(evaluator_args={"knn": {"k": 3}})
    with pytest.raises(ValueError, match=re.escape("or package.module:name, got ['nearest']")):
        EvaluationConfig(evaluators=["nearest"])


def test_an_evaluator_may_work_in_place() -> None:
    (evaluator,) = build_evaluators(configured("in_place"))
    given = splits()
    assert dict(evaluator(given)) == {"in_place/sum": 0}
    assert torch.equal(given.test.features, splits().test.features)


def test_names_and_objects() -> None:
    def own(splits: FeatureSplits) -> dict[str, float]:
        return {}

    assert names_and_objects("knn") == (["knn"], {})
    names, passed = names_and_objects(own)
    assert list(passed) == names
    assert names_and_objects(["knn", own, "geometry"])[0] == ["knn", *names, "geometry"]
    assert names_and_objects(()) == ([], {})
    with pytest.raises(ConfigError, match=r"evaluators must be names or objects .*, got 3$"):
        names_and_objects(3)
    with pytest.raises(
        ConfigError, match=r"must be an instance or a function, got the class Config: pass Config\("
    ):
        build_evaluators(
            EvaluationConfig(evaluators=list(names_and_objects([Config])[1])),
            {name: Config for name in names_and_objects([Config])[1]},
        )


def test_lists_without_brackets() -> None:
    config = parse_args(
        ["--evaluation.evaluators", "knn,own_evaluators:Margin", "--trainer.trackers=tensorboard",
         "--trainer.profile_steps", "3", "--evaluation.knn.k", "[1, 2]"]
    )[0]  # fmt: skip
    assert config.evaluation.evaluators == ["knn", "own_evaluators:Margin"]
    assert config.trainer.trackers == ["tensorboard"]
    assert config.trainer.profile_steps == [3]
    assert config.evaluation.knn.k == [1, 2]
    assert config.code_references() == {"evaluation.evaluators[1]": "own_evaluators:Margin"}


def test_other_options_are_left_alone() -> None:
    options = list_options(Config)
    assert {
        "--evaluation.evaluators",
        "--trainer.trackers",
        "--evaluation.knn.k",
    } <= options
    words = ["--seed", "1", "--evaluation.evaluators", "--evaluate", "false", "--trainer.trackers=[]"]
    assert join_lists(words, options) == words
