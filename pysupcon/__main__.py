"""``python -m pysupcon COMMAND ...``: runs a module's ``main(arguments) -> status``, imported when used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "evaluate": "run the evaluators on a finished run and write its report",
    "export": "write a finished run's backbone in timm's layout, with a model card",
    "compare": "compare evaluated runs: paired differences, seeds, tables, pictures",
    "transfer": "judge a finished run's encoder on another data set",
    "concatenate": "put the frozen encoders of two runs side by side, as one run",
    "circle": "show how spread follows alpha and temperature on the circle",
    "infer-groups": "infer subgroups of the classes from runs, to train with",
    "profile": "predict and measure what a large batch costs",
}


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m pysupcon COMMAND ...", "", *lines, "", "COMMAND --help explains its arguments."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 where there is no such command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        given = f"got {arguments[0]!r}" if arguments else "got nothing"
        print(
            f"pysupcon: COMMAND must be one of {', '.join(COMMANDS)}; {given}\n\n{usage()}", file=sys.stderr
        )
        return 2
    module = arguments[0].replace("-", "_")
    return import_module(f"pysupcon.commands.{module}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
