"""Evaluators of the user's own code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators.base import FeatureSplits, Result
from pysupcon.reading import one_line
from pysupcon.user_code import call_object, check_arguments, import_object, name_objects

_NAME = re.compile(r"[\w.-]+")
_CONTRACT = "return a dict, or return or yield pairs (name, value)"


class OwnEvaluator:
    """Calls an evaluator of the user and checks its results.

    Args:
        evaluate: function or instance that is called with the splits, and with ``progress`` if it has a
            parameter of this name. It returns or yields results, or returns a dict of them. A result is a
            name and a number, or a name and a tensor [N_test] with one outcome per test sample, which is
            stored in outcomes.safetensors; NAME/accuracy with the outcome NAME/correct gets an interval. It
            may have the attributes ``name`` (else the name of the function or class is used), ``units``,
            ``meanings`` and ``headline``, as in :class:`pysupcon.evaluators.Evaluator`.
        source: what the config calls it, for messages.
        arguments: further keyword arguments of the call.

    Raises:
        ConfigError: ``evaluate`` cannot be called.
    """

    def __init__(
        self, evaluate: Callable[..., Any], source: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(evaluate):
            raise ConfigError(
                f"evaluation.evaluators: {source} must be callable with FeatureSplits, got "
                f"{type(evaluate).__name__}"
            )
        self.evaluate, self.source, self.arguments = evaluate, source, dict(arguments or {})
        if inspect.isclass(evaluate):
            raise ConfigError(
                f"evaluation.evaluators: {source} must be an instance or a function, got the class "
                f"{evaluate.__name__}: pass {evaluate.__name__}(...)"
            )
        plain = getattr(evaluate, "__name__", type(evaluate).__name__)
        self.name: str = getattr(evaluate, "name", plain)
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name == "labels":
            raise ConfigError(
                f"evaluation.evaluators: the name of {source} must be letters, digits, dots, dashes and "
                f'underscores, and not "labels", got {self.name!r}: give it an attribute name'
            )
        self.units: Mapping[str, str] = getattr(evaluate, "units", {})
        self.meanings: Mapping[str, str] = getattr(evaluate, "meanings", {})
        self.headline: Sequence[str] = getattr(evaluate, "headline", ("*",))

    def __call__(self, splits: FeatureSplits, *, progress: bool = False) -> Iterator[Result]:
        """Yield the results; their names begin with the name of the evaluator.

        Raises:
            RunError: a result is not a name with a number or with an outcome per test sample.
        """
        arguments = dict(self.arguments)
        if "progress" in inspect.signature(self.evaluate).parameters:
            arguments["progress"] = progress
        try:
            # It may work in place; the evaluators after it get the features as they were.
            found = self.evaluate(replace(splits, augmented=None).copy(), **arguments)
            yield from self._checked(found, len(splits.test))
        except RunError:
            raise
        except Exception as error:
            raise RunError(
                f"evaluator {self.source} failed: {type(error).__name__}: {one_line(error)}"
            ) from error

    def _checked(self, found: Any, rows: int) -> Iterator[Result]:
        results = found.items() if isinstance(found, Mapping) else found
        if not isinstance(results, Iterable) or isinstance(results, (str, Tensor)):
            raise RunError(f"evaluator {self.source} must {_CONTRACT}, got {found!r:.60}")
        seen: set[str] = set()
        for result in results:
            if not isinstance(result, tuple) or len(result) != 2:
                raise RunError(f"evaluator {self.source} must {_CONTRACT}, got {result!r:.60}")
            name, value = result
            if not isinstance(name, str) or not name or name != " ".join(name.split()):
                raise RunError(
                    f"evaluator {self.source}: the name of a result must be one line of text, "
                    f"got {name!r:.60}"
                )
            full = name if name.startswith(f"{self.name}/") else f"{self.name}/{name}"
            if full in seen:
                raise RunError(f"evaluator {self.source}: the result {name} came twice")
            seen.add(full)
            yield full, self._value(name, value, rows)

    def _value(self, name: str, value: Any, rows: int) -> float | Tensor:
        if isinstance(value, Tensor) and value.ndim > 0:
            if value.shape != (rows,):
                raise RunError(
                    f"evaluator {self.source}: {name} must be a number or a tensor of {rows} outcomes, one "
                    f"per test sample, got shape {list(value.shape)}"
                )
            return value.detach().cpu()
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise RunError(
                f"evaluator {self.source}: {name} must be a number or a tensor, got {value!r:.60}"
            ) from error


def import_evaluator(reference: str, arguments: Mapping[str, Any]) -> OwnEvaluator:
    """Import ``package.module:name``: a class, which is called with ``arguments``, or a function of the
    splits and ``arguments``.

    Raises:
        ConfigError: it cannot be imported, or the arguments do not fit.
    """
    found: Any = import_object(reference, "evaluation.evaluators")
    field, of_arguments = "evaluation.evaluators", "evaluation.evaluator_args"
    if inspect.isclass(found):
        return OwnEvaluator(call_object(found, reference, arguments, field, of_arguments), reference)
    if callable(found):
        check_arguments(found, reference, arguments, of_arguments, None)
    return OwnEvaluator(found, reference, arguments)


def names_and_objects(evaluators: object) -> tuple[list[str], dict[str, Any]]:
    """The names under which a config records evaluators, and the objects among them by these names.

    Args:
        evaluators: names, references and objects; one or several.

    Raises:
        ConfigError: something else was passed.
    """
    single = isinstance(evaluators, str) or callable(evaluators)
    if not single and not isinstance(evaluators, Iterable):
        raise ConfigError(
            f"evaluators must be names or objects that are called with FeatureSplits, got {evaluators!r:.60}"
        )
    given: list[Any] = [evaluators] if single else list(evaluators)  # type: ignore[call-overload]
    passed = name_objects(given)
    names = iter(passed)
    return [each if isinstance(each, str) else next(names) for each in given], passed
