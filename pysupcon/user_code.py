"""Objects of the user's own code that a config names as ``package.module:name``.

A config of a run may come from somebody else. Its references are imported only after :func:`allow`, which a
training and ``pysupcon COMMAND --allow_code`` call.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from pysupcon.errors import ConfigError
from pysupcon.reading import one_line

PlainValue = bool | int | float | str | list | dict | None
"""Type of the arguments of the user's code in a config. Not Any: jsonargparse would import and call what
``class_path`` names in a value of type Any."""

_PASSED = "passed object "
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_state = {"allowed": False}


def is_reference(value: object) -> bool:
    """Return whether ``value`` has the form ``package.module:name``."""
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def is_passed(value: object) -> bool:
    """Return whether a config records ``value`` for an object that was passed to ``pysupcon.train.run``."""
    return isinstance(value, str) and value.startswith(_PASSED)


def is_own(value: object) -> bool:
    """Return whether ``value`` stands for code of the user: a reference or a passed object."""
    return is_reference(value) or is_passed(value)


def name_objects(objects: Iterable[object]) -> dict[str, Any]:
    """Return the objects that are no strings by the names that a config records for them."""
    named: dict[str, Any] = {}
    for value in objects:
        if not isinstance(value, str):
            kind = value if hasattr(value, "__qualname__") else type(value)
            plain = name = f"{_PASSED}{kind.__module__}.{kind.__qualname__}"
            number = 1
            while name in named:
                number += 1
                name = f"{plain} ({number})"
            named[name] = value
    return named


def allow() -> None:
    """Allow this process to import what the configs of runs name."""
    _state["allowed"] = True


def is_allowed() -> bool:
    """Return whether :func:`allow` was called."""
    return _state["allowed"]


def import_object(reference: str, field: str) -> Any:
    """Import an object of the user's code. The current folder is searched after the installed packages.

    Args:
        reference: ``package.module:name``; the name may have dots.
        field: field of the config, for messages.

    Raises:
        ConfigError: there is no such module or name, or the module fails at its import; the message names
            the field.
    """
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of the user may raise anything
        raise ConfigError(
            f"{field}={reference} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    return found


def check_arguments(
    found: Callable[..., Any], reference: str, arguments: Mapping[str, Any], field: str, *given: object
) -> None:
    """Check that the signature of a function or class of the user's code takes the arguments.

    Args:
        found: what ``reference`` names.
        reference: ``package.module:name``, for messages.
        arguments: keyword arguments.
        field: field of the config that holds them.
        given: positional arguments before them.

    Raises:
        ConfigError: it does not take them.
    """
    try:
        inspect.signature(found).bind(*given, **arguments)
    except TypeError as error:
        raise ConfigError(f"{field} {dict(arguments)} do not fit {reference}: {one_line(error)}") from error
    except ValueError:  # of a builtin without a signature: the call tells
        return


def call_object(
    found: Callable[..., Any], reference: str, arguments: Mapping[str, Any], field: str, arguments_field: str
) -> Any:
    """Call a function or class of the user's code.

    Args:
        found, reference, arguments: as for :func:`check_arguments`.
        field: field of the config that holds ``reference``.
        arguments_field: field of the config that holds the arguments.

    Raises:
        ConfigError: it does not take the arguments, or it fails; then the message names the line.
    """
    check_arguments(found, reference, arguments, arguments_field)
    try:
        return found(**arguments)
    except ConfigError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{field}={reference} failed: {type(error).__name__}: {one_line(error)} ({place.filename}, line "
            f"{place.lineno})"
        ) from error
