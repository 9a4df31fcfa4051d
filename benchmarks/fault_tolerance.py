"""Keeps the results of a run when an implementation fails, the GPU is lost or the run is interrupted."""

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
MAX_MESSAGE = 300
"""Number of characters of an error message that are kept."""


class DeviceLost(Exception):
    """The CUDA context is unusable, for example after an illegal address: later calls of the process fail."""


def attempt(call: Callable[[], T], device: str) -> tuple[T | None, str]:
    """Call a function that may raise any exception.

    After a failure on a GPU the cached memory is released, so that the next implementation can use it.

    Returns:
        The result and "", or None and the error message.

    Raises:
        DeviceLost: the CUDA context is unusable after the failure.
    """
    try:
        return call(), ""
    except Exception as error:
        message = describe(error)
    # Outside of the handler, because the traceback refers to the tensors of the failed call.
    gc.collect()
    if device == "cuda":
        try:
            check_device()
        except Exception as error:
            raise DeviceLost(f"{message}; after that: {describe(error)}"[:MAX_MESSAGE]) from None
    return None, message


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    kind = "out of memory" if name == "OutOfMemoryError" else name  # avoids importing torch
    return f"{kind}: {lines[0]}"[:MAX_MESSAGE]


def check_device() -> None:
    """Synchronizes, releases cached memory and runs a small kernel; raises if the GPU is unusable."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.ones(2, device="cuda").sum().item()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a temporary file and renames it, so that a reader never sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


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
