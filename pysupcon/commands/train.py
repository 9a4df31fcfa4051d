"""``pysupcon train --config FILE``: train with one process. Several processes need a launcher, ``accelerate
launch pysupcon/train.py`` or ``torchrun``."""

from __future__ import annotations

from collections.abc import Sequence

from pysupcon import train
from pysupcon.commands import program


def main(arguments: Sequence[str]) -> int:
    """Train and evaluate; return the exit status of :func:`pysupcon.train.main`."""
    return train.main(arguments, f"{program()} train")
