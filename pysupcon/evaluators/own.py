"""Evaluators of the user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pysupcon.errors import ConfigError, RunError
from pysupcon.evaluators.base import FeatureSplits, Result
from pysupcon.user_code import import_object


class OwnEvaluator:
    """Calls an evaluator of the user and checks its results.

    Args:
        evaluate: function or instance that is called with the splits, and with ``progress`` if it has a
            parameter of this name. It returns or yields results, or returns a dict of them. A result is a
            name and a number, or a name and a tensor [N_test] with one outcome per test sample. It may have
            the attributes ``name`` (else the name of the function or class is used), ``units``, ``meanings``
            and ``headline``, as in :class:`pysupcon.evaluators.Evaluator`.
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
        plain = getattr(evaluate, "__name__", type(evaluate).__name__)
        self.name: str = getattr(evaluate, "name", plain)
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
        found = self.evaluate(splits, **arguments)
        try:
            results = list(found.items() if isinstance(found, Mapping) else found)
            pairs = [(name, value) for name, value in results]
        except (TypeError, ValueError) as error:
            raise RunError(
                f"evaluator {self.source} must return a dict or pairs (name, value), got {found!r:.60}"
            ) from error
        for name, value in pairs:
            if not isinstance(name, str):
                raise RunError(
                    f"evaluator {self.source}: the name of a result must be a string, got {name!r:.60}"
                )
            full = name if name.startswith(f"{self.name}/") else f"{self.name}/{name}"
            yield full, self._value(name, value, len(splits.test))

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
    is_class, is_callable = inspect.isclass(found), callable(found)
    field = f"evaluation.evaluator_args {{{reference}: {dict(arguments)}}}"
    try:
        if is_class:
            return OwnEvaluator(found(**arguments), reference)
        if is_callable:
            inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        raise ConfigError(f"{field} do not fit: {error}") from error
    return OwnEvaluator(found, reference, arguments)
