"""Whether the compiled CUDA kernels may compute a loss on a device.

Two questions, asked of every device by itself, because the cards of one machine may differ:

1. Does the build hold code for this card? The card's compute capability and the architectures of the build
   decide (:func:`missing_code`), before any kernel is tried.
2. Do the kernels answer right? The first call with a dtype gives every operator a small problem with known
   answers (:mod:`pysupcon.pairs.known_answers`). It takes some tens of milliseconds, and as long as the
   driver needs to load the kernels. ``PYSUPCON_TRUST=1`` in the environment skips this question.

The verdict holds for the life of the process, for this device, dtype and, of float32, the number of bfloat16
parts that ``torch.set_float32_matmul_precision`` allows. If it is against the kernels, ``backend="auto"``
takes the tiled path with one warning, ``backend="cuda"`` raises the same words.

When a verdict is reached
    eager           at the first loss; other threads wait for it.
    torch.compile   while the first loss is traced: the trace calls :func:`told_obstacle`, which computes for
                    real, and holds the answer as a constant. The graph does not break.
    graph capture   never, since nothing may wait for the device there: what was not judged before is trusted
                    if the build holds code for the card. The warm-up call that torch asks for before a
                    capture judges it.
    fake tensors    never, where CUDA is not in use: what was not judged before is trusted.
``pysupcon.backends(check=True)`` judges every device beforehand.

The kernels answer in a thread of their own, on the caller's stream. A new thread has no autocast, no dispatch
mode (fake tensors, tracing), the default autograd mode and its own current device, so nothing of the caller's
reaches the check, and the check changes nothing of the caller's.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from pysupcon.pairs import known_answers, ops

__all__ = ["missing_code", "obstacle", "report", "told_obstacle"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_Key = tuple[int, torch.dtype, int]  # device index, dtype, parts of float32
_T = TypeVar("_T")

_verdicts: dict[_Key, str | None] = {}
_warned: set[_Key] = set()
_lock = threading.Lock()


def missing_code(capability: tuple[int, int], architectures: Sequence[str], ptx: str | None) -> str | None:
    """Why no code of a build runs on a card, or None if some does.

    Args:
        capability: compute capability of the card, such as (8, 6).
        architectures: those whose machine code is in the build, such as "80", "90a", "100f".
        ptx: the one whose PTX is in the build, None for none.

    Machine code runs on the same major version with the same or a larger minor one; that of a suffix "a" on
    exactly its own version. The driver compiles PTX for its own version and all later ones; PTX with a suffix
    is bound like machine code.
    """

    def version(architecture: str) -> tuple[int, int]:
        digits = architecture.rstrip("af")
        return int(digits[:-1]), int(digits[-1])

    def runs(architecture: str) -> bool:
        major, minor = version(architecture)
        if architecture.endswith("a"):
            return capability == (major, minor)
        return capability[0] == major and capability[1] >= minor

    if any(map(runs, architectures)):
        return None
    if ptx is not None and (runs(ptx) if ptx[-1] in "af" else capability >= version(ptx)):
        return None
    held = " ".join([*(f"sm_{a}" for a in architectures), *([f"compute_{ptx}"] if ptx else [])])
    mend = (
        "the kernels need 8.0 or newer"
        if capability < (8, 0)
        else f'build with PYSUPCON_CUDA_ARCHS="{capability[0]}{capability[1]}"'
    )
    return (
        f"this build holds no code for compute capability {capability[0]}.{capability[1]} "
        f"(it holds {held or 'none'}); {mend}"
    )


def parts_of_float32() -> int:
    """How many bfloat16 numbers stand for one float32 number, as ``csrc/cuda_glue.cpp`` reads it from
    torch."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "bf16":
        return 1
    if precision != "tf32":
        return 3
    try:
        return 1 if torch.get_float32_matmul_precision() == "medium" else 2
    except RuntimeError:  # torch refuses the older question where the newer setting was used
        return 2


def _key(index: int, dtype: torch.dtype) -> _Key:
    return index, dtype, parts_of_float32() if dtype == torch.float32 else 0


def _in_fresh_thread(function: Callable[[], _T]) -> _T:
    def alone() -> _T:
        # A pool of threads that meets a loaded machine (data loaders) takes seconds for what one does in
        # milliseconds.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(alone).result()


def _examine(device: torch.device, dtype: torch.dtype, parts: int) -> str | None:
    """What the kernels answer wrongly, None if nothing."""
    stream = torch.cuda.current_stream(device)

    def check() -> str | None:
        with torch.cuda.stream(stream):
            return known_answers.disagreement(ops, device, dtype, parts)

    return _in_fresh_thread(check)


def _words(key: _Key, why: str) -> str:
    index, dtype, parts = key
    name = torch.cuda.get_device_name(index)
    return f"pysupcon's CUDA kernels are not used for {_of(dtype, parts)} on cuda:{index} ({name}): {why}"


def _of(dtype: torch.dtype, parts: int) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if parts in (0, 3) else f"{name} as {parts} bfloat16 part{'s' if parts > 1 else ''}"


def _capturing(index: int) -> bool:
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def obstacle(index: int, dtype: torch.dtype) -> str | None:
    """Why the kernels are not used for rows of ``dtype`` on device ``index``; None if they are.

    The first call computes, the others look up.
    """
    key = _key(index, dtype)
    try:
        return _verdicts[key]
    except KeyError:
        pass
    if not torch.cuda.is_initialized():  # these are fake tensors
        return None
    with _lock:
        if key not in _verdicts:
            why = missing_code(torch.cuda.get_device_capability(index), *ops.cuda_code())
            if why is None and os.environ.get("PYSUPCON_TRUST") != "1":
                if _capturing(index):
                    return None
                try:
                    why = _examine(torch.device("cuda", index), dtype, key[2])
                except torch.OutOfMemoryError:  # says nothing of the kernels; the next call asks again
                    return None
            _verdicts[key] = None if why is None else _words(key, why)
        return _verdicts[key]


def told_obstacle(device: torch.device, dtype: torch.dtype, tell: bool) -> str | None:
    """:func:`obstacle`; with ``tell`` the first call that meets it warns."""
    index = 0 if device.index is None else device.index
    why = obstacle(index, dtype)
    if why is not None and tell:
        key = _key(index, dtype)
        with _lock:
            first = key not in _warned
            _warned.add(key)
        if first:
            words = f"{why}; the slower pure-PyTorch path, backend='tiled', takes its place"
            warnings.warn(words, stacklevel=6)  # of the loss's caller
    return why


def report(check: bool) -> dict[str, dict[str, Any]]:
    """Per CUDA device, by its name in torch: what ``pysupcon.backends()`` says of it."""
    devices: dict[str, dict[str, Any]] = {}
    for index in range(torch.cuda.device_count()):
        if check:
            torch.cuda.init()
            for dtype in DTYPES:
                obstacle(index, dtype)
        capability = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
        why = missing_code(capability, *ops.cuda_code())
        verdicts = {_of(*key[1:]): verdict for key, verdict in list(_verdicts.items()) if key[0] == index}
        refused = [verdict for verdict in verdicts.values() if verdict is not None]
        if why is not None:
            detail = f"{name}: {why}"
        elif refused:
            detail = f"{name}: {'; '.join(refused)}"
        elif verdicts:
            detail = f"{name}: in use for {', '.join(verdicts)}"
        else:
            detail = f"{name}: not tried yet"
        available = why is None and (not verdicts or len(refused) < len(verdicts))
        devices[f"cuda:{index}"] = {"available": available, "detail": detail}
    return devices
