"""Config files that extend other files, and fields with dots in their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pysupcon import named_configs
from pysupcon.errors import ConfigError
from pysupcon.reading import one_line, parse_yaml

_PLAIN = ("coarse_map", "columns", "dataset_args", "augmentation_args", "backbone_args", "evaluator_args")
"""Fields that are mappings, whose keys may have dots"""


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Expand names with dots, recursively, and convert paths to strings."""
    expanded: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Path):
            value = str(value)
        elif is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        elif isinstance(value, Mapping) and name not in _PLAIN:
            value = nested(value)
        for part in reversed(name.split(".")[1:]):
            value = {part: value}
        merge(expanded, {name.split(".")[0]: value})
    return expanded


def compose(path: str | Path) -> dict[str, Any]:
    """Read a config file and the files that it extends.

    A file extends others with ``config: FILE`` or ``config: [FILE, FILE]``, with paths relative to the file.
    The extended files are merged in order, then the file's own fields. Sections are merged recursively; for
    other fields the last value wins. Extended files may extend files in turn. Instead of a file, a name of
    :mod:`pysupcon.named_configs` may be given.

    Raises:
        ConfigError: a file is missing, is not YAML, is not a mapping, or extends itself; the message names
            it.
    """
    return _compose(path, Path(), ())


def _compose(given: str | Path, beside: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    from jsonargparse import get_loader

    named_by = f" (named by {extending[-1]})" if extending else ""
    try:
        path = named_configs.find(given, beside)
    except ValueError as error:
        raise ConfigError(f"{beside / given}{named_by} cannot be read: {error}") from None
    resolved = Path(os.path.realpath(path))  # unlike Path.resolve, it accepts a loop of links
    if resolved in extending:
        raise ConfigError(f"{path}: config must not lead back to the file itself")
    try:
        own = parse_yaml(path.read_text(encoding="utf-8"), get_loader("yaml"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}{named_by} cannot be read as YAML: {one_line(error)}") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold a mapping of config fields, got {type(own).__name__}")
    check_sections(path, own)
    named = own.pop("config", [])
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{path}: config must be a file or a list of files, got {named!r}")
    fields: dict[str, Any] = {}
    for name in named:
        merge(fields, _compose(name, path.parent, (*extending, resolved)))
    merge(fields, own)
    return fields


def check_sections(path: Path, fields: dict[str, Any]) -> None:
    """Check that the sections hold fields.

    jsonargparse would read a file that a section names, and import the module that a ``class_path`` names.
    """
    for name in set(fields) & {"data", "model", "loss", "optimizer", "trainer"}:
        section = fields[name]
        if not isinstance(section, dict) or "class_path" in section:
            raise ConfigError(f"{path}: {name} must be a mapping of fields, got {section!r}")


def merge(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(fields.get(key), dict):
            merge(fields[key], value)
        else:
            fields[key] = value
