"""Named ranges for torch.profiler and Nsight.

pysupcon::loss       a loss, from its arguments to its value
pysupcon::gather     communication between processes in the forward and backward of a loss
encoder, optimizer   parts of a training step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_P = ParamSpec("_P")
_R = TypeVar("_R")


def region(name: str) -> AbstractContextManager[None]:
    """Context manager for a named range; negligible cost without a profiler; not part of a compiled graph."""
    if torch.compiler.is_compiling():
        return nullcontext()
    profiled, on_gpu = torch.autograd._profiler_enabled(), torch.cuda.is_initialized()
    return _region(name, profiled, on_gpu) if profiled or on_gpu else nullcontext()


@contextmanager
def _region(name: str, profiled: bool, on_gpu: bool) -> Iterator[None]:
    with torch.profiler.record_function(name) if profiled else nullcontext():
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


def named(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator that runs the function in the range ``name``."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with region(name):
                return function(*args, **kwargs)

        return wrapper

    return decorate
