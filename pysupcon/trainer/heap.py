"""Freed memory stays in the process during a training on a CPU.

Without this, glibc returns large blocks to the system when they are freed: every step maps its activations
anew, and the kernel clears each of their pages. That can take a third of a step.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt, from malloc.h"""
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Environment variables with which the user decides"""
_NEVER, _DEFAULT_MMAP_MAX = -1, 65_536
_LARGEST_THRESHOLD = 32 * 2**20


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Context manager of a training; afterwards the freed memory is returned to the system.

    It does nothing on other devices than a CPU, without glibc, and if one of :data:`VARIABLES` or
    ``glibc.malloc`` in ``GLIBC_TUNABLES`` is set.

    Args:
        device: device of the training.
    """
    libc = _glibc() if device.type == "cpu" and not _is_set_by_user() else None
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, _DEFAULT_MMAP_MAX)
        # glibc raises its thresholds to these values when large blocks are freed, until mallopt is called.
        libc.mallopt(MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.malloc_trim(0)


def _is_set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name in os.environ for name in VARIABLES)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")  # musl has none of them
    return libc if all(hasattr(libc, name) for name in names) else None
