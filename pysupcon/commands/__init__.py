"""``pysupcon COMMAND``: one module per command, each with ``main(arguments) -> exit status``."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """How the user started the program: "pysupcon" or "python -m pysupcon"."""
    return "pysupcon" if Path(sys.argv[0]).stem == "pysupcon" else "python -m pysupcon"
