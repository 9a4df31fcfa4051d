"""The parser of the command line and of configs as mappings, on jsonargparse."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import yaml

from pysupcon.config.composed import compose
from pysupcon.config.fields import Config
from pysupcon.errors import ConfigError
from pysupcon.reading import did_you_mean, one_line


@lru_cache(maxsize=1)  # parsing the docstrings is slow
def build_parser() -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        allow_abbrev=False,
        prog="train.py", exit_on_error=False,
        description="Train a representation with a contrastive loss. --config FILE.yaml sets the fields; "
        "later arguments override the file, e.g. --loss.temperature 0.1.",
    )  # fmt: skip

    class ComposedFile(jsonargparse.ActionConfigFile):
        """Like jsonargparse's own action, but a file may extend several files, and sections are merged."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            self.apply_config(parser, cfg, self.dest, yaml.safe_dump(compose(values), sort_keys=False))
            cfg[self.dest][-1] = values

    parser.add_argument(
        "--config", action=ComposedFile,
        help="YAML file with any of the fields below, or the name of an example config, such as "
        "mnist_coarse_spread. Its field config names the files that it extends.",
    )  # fmt: skip
    parser.add_class_arguments(Config)
    return parser


def instantiate(parser: Any, parse: Any) -> tuple[Config, Any]:
    import argparse

    try:
        parsed = parse()
        config = Config(
            **{name: value for name, value in parser.instantiate(parsed).items() if name != "config"}
        )
    except ConfigError:
        raise
    except (argparse.ArgumentError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(did_you_mean(_one_line(error), parser)) from error
    except ValueError as error:  # only the evaluators raise ValueError
        raise ConfigError(f"evaluation: {_one_line(error)}") from error
    config.resolve()
    return config, parsed


def _one_line(error: Exception) -> str:
    """Return the message on one line; type errors of jsonargparse become "FIELD must be TYPE, got VALUE"."""
    text = one_line(error)
    match = re.match(r'Parser key "(?P<field>[^"]+)": (?P<rest>.*)', text)
    if match is None:
        return text
    expected = re.findall(r"Expected an? (.+?)(?= - |\. Got| Given|$)", match["rest"])
    got = re.search(r"(?:Got|Given) value: (.*)", match["rest"])
    if not expected or got is None:
        return f"{match['field']}: {match['rest']}"
    names = [re.sub(r"<class '(\w+)'>|typing\.", r"\1", name) for name in expected]
    return f"{match['field']} must be {' or '.join(names)}, got {got[1]!r}"
