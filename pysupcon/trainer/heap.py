"""Freed memory stays in the process during a training on a CPU.

Without this, glibc returns large blocks to the system when they are freed: every step maps its activations
anew, and the kernel clears each of their pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pysupcon.profiling import malloc

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Environment variables with which the user decides"""
_NEVER, _DEFAULT_MMAP_MAX = -1, 65_536


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Context manager of a training; afterwards the freed memory is returned to the system.

    It does nothing on other devices than a CPU, without glibc, and if one of :data:`VARIABLES` or
    ``glibc.malloc`` in ``GLIBC_TUNABLES`` is set.

    Args:
        device: device of the training.
    """
    libc = malloc.glibc() if device.type == "cpu" and not _is_set_by_user() else None
    if libc is None:
        yield
        return
    libc.mallopt(malloc.MMAP_MAX, 0)
    libc.mallopt(malloc.TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(malloc.MMAP_MAX, _DEFAULT_MMAP_MAX)
        malloc.reset_thresholds(libc)
        libc.malloc_trim(0)


def _is_set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name in os.environ for name in VARIABLES)
