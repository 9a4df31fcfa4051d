"""``pysupcon COMMAND``, also as ``python -m pysupcon COMMAND``: run one of the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pysupcon.commands import program
from pysupcon.errors import missing_extra

COMMANDS = {
    "train": "train an encoder with one process, without a launcher, and evaluate it",
    "evaluate": "run the evaluators on a finished run and write a report",
    "export": "write a run's backbone in timm's layout, with a model card",
    "compare": "compare evaluated runs: paired differences, tables, pictures",
    "transfer": "evaluate a finished run's encoder on another data set",
    "concatenate": "concatenate the frozen encoders of two runs into one run",
    "circle": "show how class spread depends on alpha and temperature",
    "infer-groups": "infer subgroups of the classes, for group-robust training",
    "profile": "predict and measure time and memory of a large batch",
}


def usage() -> str:
    """Return the usage text: one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program()} COMMAND ...",
            "",
            *lines,
            "",
            f"{program()} COMMAND --help explains the arguments of a command.",
            "--allow_code imports the Python code that the config of a run names (package.module:name).",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its arguments; None means ``sys.argv[1:]``.

    Returns:
        The exit status of the command; 2 if there is no such command. A file that cannot be read or written
        or an optional package that is not installed is one line on stderr, with the status 1.
    """
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
    if "--allow_code" in arguments:
        arguments.remove("--allow_code")
        from pysupcon.user_code import allow

        allow()
    module = arguments[0].replace("-", "_")
    try:
        status: int = import_module(f"pysupcon.commands.{module}").main(arguments[1:])
    except OSError as error:
        if error.filename is None:
            raise
        print(f"pysupcon {arguments[0]}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(f"pysupcon {arguments[0]}: {message}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
