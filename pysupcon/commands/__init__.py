"""``pysupcon COMMAND``: one module per command, each with ``main(arguments) -> exit status``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pysupcon.reading import did_you_mean

if TYPE_CHECKING:
    import jsonargparse


def program() -> str:
    """How the user started the program: "pysupcon" or "python -m pysupcon"."""
    return "pysupcon" if Path(sys.argv[0]).stem == "pysupcon" else "python -m pysupcon"


def plain_parser(**options: Any) -> argparse.ArgumentParser:
    """A parser that refuses abbreviated options and suggests the most similar one.

    Args:
        options: keywords of ``argparse.ArgumentParser``.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(did_you_mean(message, self))

    return Parser(allow_abbrev=False, **options)


def config_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """The same for options that are the fields of dataclasses, explained by the docstrings of the fields.

    Args:
        options: keywords of ``jsonargparse.ArgumentParser``.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, *details: Any) -> NoReturn:
            super().error(did_you_mean(message, self), *details)

    return Parser(allow_abbrev=False, **options)
