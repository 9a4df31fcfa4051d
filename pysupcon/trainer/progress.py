"""A word on whatever takes longer than a second or two."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DELAY = 1.0
"""Seconds before a word is said."""


@contextmanager
def waiting(text: str, *, shown: bool = True) -> Iterator[None]:
    """Say ``text ...`` on stderr if the block takes longer than :data:`DELAY`; only if ``shown``."""
    timer = threading.Timer(DELAY, say, (f"{text} ...",))
    timer.daemon = True
    if shown:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str) -> None:
    """A line on stderr, above the bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
