"""The config in the folder of a run: written in full, and read within limits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pysupcon import user_code
from pysupcon.caller import warn_caller
from pysupcon.config.composed import check_sections
from pysupcon.config.fields import Config
from pysupcon.config.parser import build_parser, instantiate
from pysupcon.errors import ConfigError
from pysupcon.evaluators import EvaluationConfig
from pysupcon.reading import check_yaml, read_yaml


def load_config(path: str | Path) -> Config:
    """Read the config of a run, and refuse references to the user's code unless they are allowed.

    The run may be older or newer than the evaluators. Unknown fields of its evaluation section are ignored
    with a warning; a section that is still not valid is replaced by the defaults with a warning. The run may
    also come from somebody else: the limits of :mod:`pysupcon.reading` apply, and no class is instantiated.

    Raises:
        ConfigError: the file is missing, is not YAML or not a valid config; the message names file and field.
    """
    path = Path(path)
    config = _load_config(path)
    references = config.code_references()
    if references and not user_code.is_allowed():
        named = ", ".join(f"{name}={value}" for name, value in references.items())
        raise ConfigError(
            f"{path} names Python code ({named}), which is imported only with --allow_code (in Python: "
            "pysupcon.user_code.allow()). Pass it if you trust the run"
        )
    return config


def _load_config(path: Path) -> Config:
    try:
        text = read_yaml(path)
        _check_strings(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(text, dict):
        raise ConfigError(f"{path} must hold a mapping of config fields, got {type(text).__name__}")
    check_sections(path, text)
    if "config" in text:  # jsonargparse asserts that a file named there has been read already
        raise ConfigError(f"{path}: config must be left out: a run's config is complete")
    evaluation = text.get("evaluation", {})
    if not isinstance(evaluation, dict):
        warn_caller(f"{path}: the defaults are used for evaluation: it is no mapping")
        del text["evaluation"]
    else:
        unknown = _drop_unknown(EvaluationConfig, evaluation, "evaluation")
        if unknown:
            warn_caller(f"{path}: {', '.join(unknown)} is unknown and ignored")
    parser = build_parser()
    try:
        return instantiate(parser, lambda: parser.parse_object(text))[0]
    except ConfigError as error:
        if "evaluation" not in str(error) or not text.pop("evaluation", None):
            raise ConfigError(f"{path}: {error}") from error
        config = instantiate(parser, lambda: parser.parse_object(text))[0]
        warn_caller(f"{path}: the defaults are used for evaluation: {error}")
        return config


def to_yaml(config: Config) -> str:
    """Return the config as YAML with all defaults, for :func:`load_config`.

    It does not hold ``resume_from_checkpoint``: a training from the file of a run would resume unasked.
    """
    fields = asdict(config) | {"resume_from_checkpoint": None}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _check_strings(value: Any) -> None:
    """Check the strings in the values of a config: jsonargparse parses some of them as YAML.

    Raises:
        ValueError: a string exceeds the limits of YAML documents.
    """
    if isinstance(value, str):
        if len(value) > 100:  # a shorter one cannot exceed the limits
            with suppress(yaml.YAMLError):
                check_yaml(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_strings(key)
            _check_strings(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_strings(entry)


def _drop_unknown(kind: type, values: dict[str, Any], name: str) -> list[str]:
    """Remove keys that are not fields of the dataclass ``kind``, recursively; return their names."""
    types = get_type_hints(kind)
    unknown = [key for key in values if key not in types]
    for key in unknown:
        del values[key]
    dropped = [f"{name}.{key}" for key in unknown]
    for key, value in values.items():
        if isinstance(value, dict) and is_dataclass(types[key]):
            dropped += _drop_unknown(types[key], value, f"{name}.{key}")
    return dropped
