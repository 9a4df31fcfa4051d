"""What keeps a run's numbers when something goes wrong: one implementation, the device, or the time."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
WORDS = 300
"""characters of an error that are kept"""


class DeviceLost(Exception):
    """The CUDA context is beyond use (an illegal address, say): every later call of this process fails."""


def attempt(call: Callable[[], T], device: str) -> tuple[T | None, str]:
    """The result of a call that may fail in any way, or None and what went wrong.

    After a failure on a GPU its memory is given back, so that the next implementation has all of it.

    Raises:
        DeviceLost: the failure left the CUDA context unusable.
    """
    try:
        return call(), ""
    except Exception as error:
        words = describe(error)
    # Outside of the handler: the traceback held the failed call's tensors.
    gc.collect()
    if device == "cuda":
        try:
            check_device()
        except Exception as error:
            raise DeviceLost(f"{words}; after that: {describe(error)}"[:WORDS]) from None
    return None, words


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    kind = "out of memory" if name == "OutOfMemoryError" else name  # torch's, which need not be here
    return f"{kind}: {lines[0]}"[:WORDS]


def check_device() -> None:
    """Waits for the GPU, gives cached memory back and computes something; raises what is left of an error."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.ones(2, device="cuda").sum().item()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes aside and renames: whoever reads the file finds it whole, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt, also in a process that was started with SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
