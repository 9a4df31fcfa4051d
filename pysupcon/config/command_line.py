"""The config from the command line, or from Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pysupcon.config.composed import compose, merge, nested
from pysupcon.config.fields import Config
from pysupcon.config.parser import build_parser, instantiate
from pysupcon.errors import ConfigError
from pysupcon.reading import join_lists, list_options


def parse_args(args: Sequence[str] | None = None, program: str = "train.py") -> tuple[Config, str]:
    """Read the command line: ``--config FILE_OR_NAME`` (see :func:`compose`) and ``--FIELD VALUE``.

    Args:
        args: the arguments; None means ``sys.argv[1:]``. ``--help`` and ``--print_config`` print and exit.
        program: name of the program in the help text.

    Returns:
        The resolved config, and the name of the run: the stem of the config file, or loss-dataset.

    Raises:
        ConfigError: a field is unknown, a type is wrong, a file cannot be read, or values contradict each
            other.
    """
    parser = build_parser()
    parser.prog = program
    words = join_lists(sys.argv[1:] if args is None else args, list_options(Config))
    config, parsed = instantiate(parser, lambda: parser.parse_args(words))
    if config.model.concatenated:
        raise ConfigError("model.concatenated describes backbones that are frozen: they cannot be trained")
    files = parsed.get("config") or []
    name = Path(str(files[-1])).stem if files else f"{config.loss.name}-{config.data.dataset}"
    return config, name


def config_of(source: Config | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> Config:
    """Build a config in Python.

    Args:
        source: a config, a mapping of its fields, a YAML file or the name of an example config (see
            :mod:`pysupcon.named_configs`), or None for the defaults.
        fields: fields that override those of ``source``: sections, e.g. ``{"trainer": {"epochs": 3}}``, or
            single fields, e.g. ``{"trainer.epochs": 3}``.

    Raises:
        ConfigError: as :func:`parse_args`.
    """
    values: dict[str, Any] = {}
    if isinstance(source, Config):
        values = asdict(source)
    elif isinstance(source, (str, Path)):
        values = compose(source)
    elif source is not None:
        merge(values, nested(source))
    merge(values, nested(fields))
    parser = build_parser()
    config = instantiate(parser, lambda: parser.parse_object(values))[0]
    if config.model.concatenated:
        raise ConfigError("model.concatenated describes backbones that are frozen: they cannot be trained")
    return config
