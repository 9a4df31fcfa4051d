"""Read the YAML and JSON files of a run within fixed limits: the run may come from somebody else.

A small YAML file can stand for billions of values, because an alias repeats a part of the document. Deeply
nested values exceed Python's recursion limit, and a pipe blocks its reader.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

MAX_YAML_BYTES = 4 * 2**20
MAX_YAML_VALUES = 200_000
"""Keys and values of a YAML document after the expansion of its aliases."""
MAX_YAML_DEPTH = 50
_MAX_NUMBER = 1000
"""Characters of a number. PyYAML reads 1:59:59 as a number of base 60, in time quadratic in its length."""
MAX_JSON_BYTES = 64 * 2**20


def one_line(error: object) -> str:
    """Return the text of an error on one line.

    Args:
        error: an exception or its text. Of an OSError only the reason is returned, without the path.
    """
    reason = getattr(error, "strerror", None) or error
    return " ".join(str(reason).split()) or type(error).__name__


def check_regular(path: str | Path) -> None:
    """Check that ``path`` is a regular file, after following links.

    Raises:
        OSError: there is no such file, or it cannot be accessed.
        ValueError: it is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of at most ``MAX_YAML_BYTES`` in UTF-8, see :func:`parse_yaml`.

    Args:
        path: the file.

    Returns:
        Its value: dicts, lists, numbers, texts, dates, True, False or None.

    Raises:
        ValueError: the file cannot be read or exceeds a limit; the message is one line without the path.
    """
    return parse_yaml(_read_text(path, MAX_YAML_BYTES))


def parse_yaml(text: str, load: Callable[[str], Any] | None = None) -> Any:
    """Check the limits of a YAML document, then parse it.

    Args:
        text: the document.
        load: function that parses the text; None: PyYAML's safe loader.

    Returns:
        What ``load`` returns.

    Raises:
        ValueError: the text is not YAML, or has more than ``MAX_YAML_VALUES`` values or ``MAX_YAML_DEPTH``
            levels, or ``load`` fails; the message is one line.
    """
    import yaml

    try:
        check_yaml(text)
        return yaml.load(text, Loader=_loader()) if load is None else load(text)
    except Exception as error:  # e.g. PyYAML raises KeyError for "!!bool x" and OverflowError for a float
        raise ValueError(one_line(error)) from error


def check_yaml(text: str) -> None:
    """Check the limits of a YAML document without building its values.

    Args:
        text: the document.

    Raises:
        ValueError: the document exceeds a limit, or an alias refers to its own parent.
        yaml.YAMLError: the text is not YAML.
    """
    import yaml

    sizes: dict[str, int] = {}  # values of each complete part that has an anchor (&name)
    parts: list[tuple[str | None, int]] = []  # anchor and start of each list or mapping that is still open
    count = 0  # values so far, aliases expanded
    for event in yaml.parse(text, Loader=_loader()):
        if isinstance(event, yaml.CollectionStartEvent):
            parts.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            # A tag such as !!int makes a number of any text.
            number = event.tag is not None or event.value[:1] in tuple("+-.0123456789")
            if number and len(event.value) > _MAX_NUMBER:
                raise ValueError(f"a number must have at most {_MAX_NUMBER} characters, got more")
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in parts):
                raise ValueError(f"the alias *{event.anchor} must not refer to a part that contains it")
            count += sizes.get(str(event.anchor), 1)  # the loader reports an unknown anchor
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = parts.pop()
            if anchor is not None:
                sizes[anchor] = count - start
        if len(parts) > MAX_YAML_DEPTH:
            raise ValueError(f"it must have at most {MAX_YAML_DEPTH} nested levels, got more")
        if count > MAX_YAML_VALUES:
            raise ValueError(f"it must hold at most {MAX_YAML_VALUES} values, aliases expanded, got more")


def read_json(path: str | Path) -> Any:
    """Read a JSON file of at most ``MAX_JSON_BYTES`` in UTF-8.

    Args:
        path: the file.

    Returns:
        Its value: dicts, lists, numbers, texts, True, False or None.

    Raises:
        ValueError: the file cannot be read, is not JSON, or is too large or too deeply nested; the message is
            one line without the path.
    """
    return parse_json(_read_text(path, MAX_JSON_BYTES))


def parse_json(content: str | bytes) -> Any:
    """Parse a JSON document.

    Args:
        content: the document; bytes are UTF-8.

    Returns:
        Its value, see :func:`read_json`.

    Raises:
        ValueError: the content is not JSON or too deeply nested; the message is one line.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(one_line(error)) from error
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: the file.
        limit: number of bytes that it may have; None: any.

    Raises:
        ValueError: the file is missing, not a regular file, too large, or cannot be read; the message is one
            line without the path.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            content = file.read(-1 if limit is None else limit + 1)
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from error
    if limit is not None and len(content) > limit:
        raise ValueError(f"it must have at most {limit} bytes, got more")
    return content


def _loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml


def _read_text(path: str | Path, limit: int) -> str:
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(one_line(error)) from error


def join_lists(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Accept ``--OPTION a,b`` for list options of jsonargparse, which takes ``--OPTION [a, b]``.

    Args:
        arguments: a command line.
        options: names of the list options, with their dashes.

    Returns:
        The command line with brackets around the values of these options.
    """
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in options:
            found.append(f"{name}={_bracketed(value)}")
        elif found and found[-1] in options and not argument.startswith("--"):
            found.append(_bracketed(argument))
        else:
            found.append(argument)
    return found


def list_options(kind: type, prefix: str = "--") -> set[str]:
    """Return the command line options of the fields of a dataclass that are lists, recursively."""
    options: set[str] = set()
    for name, expected in get_type_hints(kind).items():
        if is_dataclass(expected):
            options |= list_options(expected, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif get_origin(expected) is list and get_args(expected)[0] is not dict:
            options.add(f"{prefix}{name}")
    return options


def _bracketed(value: str) -> str:
    return value if value.lstrip()[:1] in ("[", "{") or not value.strip() else f"[{value}]"


def did_you_mean(text: str, parser: argparse.ArgumentParser) -> str:
    """Add the most similar option to a parser's message about an unknown one.

    Args:
        text: the message.
        parser: the parser, of argparse or jsonargparse.
    """
    match = re.search(
        r"unrecognized arguments: .*?--([\w.-]+)"
        r"|Group '([\w.]+)' does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted",
        text,
    )
    if match is None:
        return text
    name = ".".join(filter(None, match.groups()))
    names = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    # Of another command: evaluation.pictures of a training is pictures of pysupcon evaluate.
    similar += [each for each in names if name.endswith(f".{each}") or each.endswith(f".{name}")]
    return f"{text}; did you mean {similar[0]}?" if similar else text
