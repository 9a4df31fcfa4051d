"""Peak memory of a piece of work, and how much there is."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_REFERENCES = Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that ``work`` adds at its peak to what is there when it starts.

    On CUDA what torch allocates. Elsewhere resident memory of the process, freed blocks given back to the
    system first; all of the process's threads count, and libraries that ``work`` is the first to use do too.

    Raises:
        OSError: there is no /proc to read the resident memory from.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    marked = _forget_peak()
    before = resident_bytes()
    sampler = None if marked else _Sampler()
    work()
    peak = resident_bytes("VmHWM") if sampler is None else sampler.finish()
    return max(peak - before, 0)


def available_bytes(device: torch.device) -> int:
    """Free on the device; on the CPU what the system could still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found is None:
        raise OSError("/proc/meminfo has no MemAvailable")
    return int(found.group(1)) * 1024


def resident_bytes(field: str = "VmRSS") -> int:
    """``VmRSS``: resident now; ``VmHWM``: at most, since the process started or since it was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _read(_STATUS), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")


def _forget_peak() -> bool:
    """Makes VmHWM start from what is resident now; False where the kernel refuses."""
    try:
        _REFERENCES.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """So that freed blocks, which would be used again, are not counted as there already."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


class _Sampler(threading.Thread):
    """The highest resident set, looked at every millisecond: for kernels that keep no mark to reset."""

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
