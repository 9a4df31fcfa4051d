"""Record selected steps with torch.profiler and write the results to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from pysupcon.errors import RunError
from pysupcon.profiling.memory import peak_bytes
from pysupcon.profiling.picture import draw_memory, read_allocated

TRACE_FILE = "trace.json"
TABLE_FILE = "operators.txt"
MEMORY_FILE = "memory.png"
SNAPSHOT_FILE = "memory_snapshot.pickle"


@contextmanager
def recorded(device: torch.device) -> Iterator[profile]:
    """Record the operators and the memory of the block."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as found:
        yield found
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def operator_table(found: profile, device: torch.device, rows: int = 25) -> str:
    """Return the table of the slowest operators and ranges."""
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # The total time of a range includes its operators. Self times sum up to the whole.
    return found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=48)


def write_record(found: profile, device: torch.device, folder: Path) -> list[Path]:
    """Write TRACE_FILE (Chrome, Perfetto), TABLE_FILE and, if the trace holds allocations, MEMORY_FILE.

    Returns:
        the files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / TRACE_FILE))
    (folder / TABLE_FILE).write_text(operator_table(found, device, rows=100) + "\n", encoding="utf-8")
    written = [folder / TRACE_FILE, folder / TABLE_FILE]
    if draw_memory(folder / TRACE_FILE, folder / MEMORY_FILE, device.type):
        written.append(folder / MEMORY_FILE)
    return written


def allocated_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Return the peak of the memory that torch allocates for ``work``, in bytes.

    On the CPU this is exact for small work too. Resident memory is not: the system counts it in steps of
    hundreds of kilobytes. Buffers that are not tensors are left out: a few percent in the CPU kernels.
    """
    if device.type == "cuda":
        return peak_bytes(device, work)
    with recorded(device) as found:
        work()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / TRACE_FILE
        found.export_chrome_trace(str(trace))
        return allocated_in(trace)


def allocated_in(trace: Path) -> int:
    """Return the peak of the memory that torch allocated on the CPU during a recorded block, in bytes."""
    return max(read_allocated(trace, "cpu").bytes, default=0)


class StepRecorder:
    """Record selected steps of a training.

    Args:
        steps: numbers of the steps, from 1.
        folder: parent of the folders ``step-N``.
        device: device of the training.
    """

    def __init__(self, steps: Sequence[int], folder: Path, device: torch.device) -> None:
        self.steps = frozenset(steps)
        self.folder = folder
        self.device = device

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager around step ``number``; records it if it is selected.

        Raises:
            RunError: the results cannot be written.
        """
        if number not in self.steps:
            yield
            return
        with recorded(self.device) as found:
            yield
        folder = self.folder / f"step-{number}"
        try:
            write_record(found, self.device, folder)
        except (OSError, RuntimeError, ValueError) as error:  # a trace cut by a full disk is not JSON
            raise RunError(f"{folder} could not be written: {' '.join(str(error).split())}") from error
