"""Progress messages on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DELAY = 1.0
"""Seconds after which :func:`report_if_slow` prints its message."""


@contextmanager
def report_if_slow(text: str, *, enabled: bool = True) -> Iterator[None]:
    """Print ``text ...`` if the block takes longer than :data:`DELAY` and ``enabled`` is true."""
    timer = threading.Timer(DELAY, print_line, (f"{text} ...",))
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def print_line(text: str) -> None:
    """Print a line on stderr, above the progress bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
