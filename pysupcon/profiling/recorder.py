"""torch.profiler around chosen stretches of work, and what is left of it on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TRACE_FILE = "trace.json"
TABLE_FILE = "operators.txt"
MEMORY_FILE = "memory.png"
SNAPSHOT_FILE = "memory_snapshot.pickle"


@contextmanager
def recorded(device: torch.device) -> Iterator[profile]:
    """Records operators and memory of what happens inside."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as found:
        yield found
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def operator_table(found: profile, device: torch.device, rows: int = 25) -> str:
    """The operators and ranges that took longest."""
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # An operator counts in its range as well: by its own time the table adds up to the whole.
    return found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=48)


def write_record(found: profile, device: torch.device, folder: Path) -> None:
    """TRACE_FILE (Chrome, Perfetto), TABLE_FILE and, if it holds what was allocated, MEMORY_FILE."""
    from pysupcon.profiling.picture import draw_memory

    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / TRACE_FILE))
    (folder / TABLE_FILE).write_text(operator_table(found, device, rows=100) + "\n", encoding="utf-8")
    draw_memory(folder / TRACE_FILE, folder / MEMORY_FILE, device.type)


class StepRecorder:
    """Records the steps of a training that were asked for.

    Args:
        steps: their numbers, from 1.
        folder: gets a folder ``step-N`` for each.
        device: of the training.
    """

    def __init__(self, steps: Sequence[int], folder: Path, device: torch.device) -> None:
        self.steps = frozenset(steps)
        self.folder = folder
        self.device = device

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step."""
        if number not in self.steps:
            yield
            return
        with recorded(self.device) as found:
            yield
        write_record(found, self.device, self.folder / f"step-{number}")
