"""Whether the compiled CUDA kernels may compute a loss on a device.

Two checks, for each device separately because the cards of one machine may differ:

1. The build must contain code for the card. This follows from the card's compute capability and the
   architectures of the build (:func:`missing_code`), before any kernel runs.
2. The kernels must pass a known-answer test (:mod:`pysupcon.pairs.known_answers`) at the first call with a
   dtype. It takes some tens of milliseconds, and the time in which the driver loads the kernels.
   ``PYSUPCON_TRUST=1`` in the environment skips this check.

A verdict holds for the rest of the process. It applies to one device, one dtype and, for float32, one number
of bfloat16 parts, which ``torch.set_float32_matmul_precision`` sets. If the kernels are refused,
``backend="auto"`` takes the tiled path with one warning, and ``backend="cuda"`` raises the same message.

When a verdict is reached
    eager           at the first loss; other threads wait for it.
    torch.compile   while the first loss is traced: the trace calls :func:`check_device`, which computes on
                    real tensors, and stores the result as a constant. The graph does not break.
    graph capture   never, because a capture cannot wait for the device. Without a verdict the kernels are
                    used if the build contains code for the card. The warm-up call that torch recommends
                    before a capture reaches a verdict.
    fake tensors    never, if CUDA is not initialised. Without a verdict the kernels are used.
``pysupcon.backends(check=True)`` reaches all verdicts beforehand.

The test runs in a thread of its own, on the caller's stream. A new thread has no autocast, no dispatch mode
(fake tensors, tracing), the default autograd mode and its own current device, so the caller's modes do not
affect the test, and the test does not change them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from pysupcon.caller import warn_caller
from pysupcon.pairs import known_answers, ops

__all__ = ["check_device", "missing_code", "report", "unusable_reason"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_Key = tuple[int, torch.dtype, int]  # device index, dtype, parts of float32
_T = TypeVar("_T")

_verdicts: dict[_Key, str | None] = {}
_warned: set[_Key] = set()
_lock = threading.Lock()


def missing_code(capability: tuple[int, int], architectures: Sequence[str], ptx: str | None) -> str | None:
    """Says why no code of a build runs on a card.

    Machine code runs on cards of the same major version and the same or a larger minor version; with the
    suffix "a" only on exactly its version. The driver compiles PTX for its version and all later ones; PTX
    with a suffix has the limits of machine code.

    Args:
        capability: compute capability of the card, such as (8, 6).
        architectures: whose machine code is in the build, such as "80", "90a", "100f".
        ptx: architecture whose PTX is in the build; None: no PTX.

    Returns:
        None if some code runs.
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
    contained = " ".join([*(f"sm_{a}" for a in architectures), *([f"compute_{ptx}"] if ptx else [])])
    remedy = (
        "the kernels need 8.0 or newer"
        if capability < (8, 0)
        else f'build with PYSUPCON_CUDA_ARCHS="{capability[0]}{capability[1]}"'
    )
    return (
        f"this build holds no code for compute capability {capability[0]}.{capability[1]} "
        f"(it holds {contained or 'none'}); {remedy}"
    )


def parts_of_float32() -> int:
    """Returns the number of bfloat16 numbers that represent one float32 number, as ``csrc/cuda_glue.cpp``
    reads it from torch."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "bf16":
        return 1
    if precision != "tf32":
        return 3
    try:
        return 1 if torch.get_float32_matmul_precision() == "medium" else 2
    except RuntimeError:  # torch refuses the older getter after the newer setter
        return 2


def _key(index: int, dtype: torch.dtype) -> _Key:
    return index, dtype, parts_of_float32() if dtype == torch.float32 else 0


def _in_fresh_thread(function: Callable[[], _T]) -> _T:
    def single_threaded() -> _T:
        # On a loaded machine (data loaders) several threads take seconds where one takes milliseconds.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(single_threaded).result()


def _test_kernels(device: torch.device, dtype: torch.dtype, parts: int) -> str | None:
    """Returns the first wrong answer of the kernels, in words; None if all are right."""
    stream = torch.cuda.current_stream(device)

    def check() -> str | None:
        with torch.cuda.stream(stream):
            return known_answers.disagreement(ops, device, dtype, parts)

    return _in_fresh_thread(check)


def _message(key: _Key, reason: str) -> str:
    index, dtype, parts = key
    device = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    return f"pysupcon's CUDA kernels are not used for {_dtype_name(dtype, parts)} on {device}: {reason}"


def _dtype_name(dtype: torch.dtype, parts: int) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if parts in (0, 3) else f"{name} as {parts} bfloat16 part{'s' if parts > 1 else ''}"


def _capturing(index: int) -> bool:
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def unusable_reason(index: int, dtype: torch.dtype) -> str | None:
    """Says why the kernels are not used for rows of ``dtype`` on CUDA device ``index``.

    The first call runs the test; later calls look up the verdict.

    Returns:
        None if the kernels are used.
    """
    key = _key(index, dtype)
    try:
        return _verdicts[key]
    except KeyError:
        pass
    if not torch.cuda.is_initialized():  # the rows are fake tensors
        return None
    with _lock:
        if key not in _verdicts:
            reason = missing_code(torch.cuda.get_device_capability(index), *ops.cuda_code())
            if reason is None and os.environ.get("PYSUPCON_TRUST") != "1":
                if _capturing(index):
                    return None
                try:
                    reason = _test_kernels(torch.device("cuda", index), dtype, key[2])
                except torch.OutOfMemoryError:  # no verdict; the next call tests again
                    return None
            _verdicts[key] = None if reason is None else _message(key, reason)
        return _verdicts[key]


def check_device(device: torch.device, dtype: torch.dtype, warn: bool) -> str | None:
    """Returns :func:`unusable_reason` of a CUDA device, and warns of it once if ``warn``."""
    index = 0 if device.index is None else device.index
    reason = unusable_reason(index, dtype)
    if reason is not None and warn:
        key = _key(index, dtype)
        with _lock:
            first = key not in _warned
            _warned.add(key)
        if first:
            warn_caller(f"{reason}; falling back to the slower backend='tiled' (pure PyTorch)")
    return reason


def report(check: bool) -> dict[str, dict[str, Any]]:
    """Returns the entry ``devices`` of ``pysupcon.backends()``: one per CUDA device, by its name in torch.

    Args:
        check: run the known-answer test on all devices first.
    """
    devices: dict[str, dict[str, Any]] = {}
    for index in range(torch.cuda.device_count()):
        if check:
            torch.cuda.init()
            for dtype in DTYPES:
                unusable_reason(index, dtype)
        capability = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
        reason = missing_code(capability, *ops.cuda_code())
        verdicts = {
            _dtype_name(*key[1:]): verdict for key, verdict in list(_verdicts.items()) if key[0] == index
        }
        refused = [verdict for verdict in verdicts.values() if verdict is not None]
        if reason is not None:
            detail = f"{name}: {reason}"
        elif refused:
            detail = f"{name}: {'; '.join(refused)}"
        elif verdicts:
            detail = f"{name}: in use for {', '.join(verdicts)}"
        else:
            detail = f"{name}: not tried yet"
        available = reason is None and (not verdicts or len(refused) < len(verdicts))
        devices[f"cuda:{index}"] = {"available": available, "detail": detail}
    return devices
