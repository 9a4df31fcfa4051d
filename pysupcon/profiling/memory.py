"""Measure the peak memory of a function, and the free memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from pysupcon.profiling import malloc

_STATUS = Path("/proc/self/status")
_REFERENCES = Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device, work: Callable[[], object], *, in_use: bool = False) -> int:
    """Return the peak memory of ``work`` in bytes, relative to the memory in use before it.

    On CUDA this is memory allocated by torch. Elsewhere it is the resident memory of the process, after freed
    blocks are returned to the system; it includes libraries that ``work`` loads.

    Args:
        device: device of the work.
        work: function to run.
        in_use: on the CPU, count only blocks in use: no code of libraries, and blocks that ``work`` frees are
            returned to the system at once, which makes it slower. By default blocks that the C library keeps
            count too.

    Raises:
        OSError: the resident memory cannot be read from /proc.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    has_peak = _reset_peak()
    before, code = resident_bytes(), resident_bytes("RssFile")
    sampler = None if has_peak else _Sampler()
    with _blocks_are_mapped() if in_use else nullcontext():
        work()
    peak = resident_bytes("VmHWM") if sampler is None else sampler.finish()
    if in_use:
        before += max(resident_bytes("RssFile") - code, 0)
    return max(peak - before, 0)


def available_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes; for the CPU the available system memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found is None:
        raise OSError("/proc/meminfo has no MemAvailable")
    return int(found.group(1)) * 1024


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the resident memory in bytes: ``VmRSS`` is the current value, ``VmHWM`` the peak since its
    reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _read(_STATUS), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")


def _reset_peak() -> bool:
    """Reset VmHWM to the current resident memory; return False if the system does not allow it."""
    try:
        _REFERENCES.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """Return freed blocks to the system: their reuse would not show as an increase."""
    libc = malloc.glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def _blocks_are_mapped() -> Iterator[None]:
    """Make malloc map each block of 64 KiB or more on its own, so that it is returned when it is freed."""
    libc = malloc.glibc()
    if libc is None:
        yield
        return
    libc.mallopt(malloc.MMAP_THRESHOLD, 64 * 1024)
    try:
        yield
    finally:
        malloc.reset_thresholds(libc)


class _Sampler(threading.Thread):
    """Poll the resident memory every millisecond, for systems where VmHWM cannot be reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = resident_bytes()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, resident_bytes())

    def finish(self) -> int:
        self.done.set()
        self.join()
        return max(self.highest, resident_bytes())
