"""Settings of glibc's malloc in this process."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt, from malloc.h"""
_LARGEST_THRESHOLD = 32 * 2**20


def glibc() -> ctypes.CDLL | None:
    """The C library of this process; None if it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")  # musl has none of them
    return libc if all(hasattr(libc, name) for name in names) else None


def reset_thresholds(libc: ctypes.CDLL) -> None:
    """Set the thresholds that glibc itself reaches when large blocks are freed, until mallopt is called."""
    libc.mallopt(MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    libc.mallopt(TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
