"""Names for stretches of the product's code, seen in torch.profiler's tables and traces and in Nsight.

pysupcon::loss       a loss, from its arguments to its value
pysupcon::gather     what its forward and backward exchange with other processes
encoder, optimizer   of a training step
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
    """A named range; costs next to nothing where nobody looks, and is no part of a compiled graph."""
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
    """Decorator: the whole function is the range ``name``."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with region(name):
                return function(*args, **kwargs)

        return inside

    return decorate
