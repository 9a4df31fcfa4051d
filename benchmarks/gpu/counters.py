"""Nsight Compute's counters of the hot kernels: the command, and a parser of its CSV output."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KERNELS = "regex:(forward|backward)_(resident|streamed|triangular)"
#: Sections have the same names on every GPU; single metrics do not.
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",  # the pipes: tensor, xu (exponentials), fma, ...
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",  # wavefronts of shared memory
    "SchedulerStats",  # issue slots
    "WarpStateStats",
    "LaunchStats",  # registers, shared memory, grid
    "Occupancy",
)
#: Metrics that are kept.
KEPT = re.compile(
    r"gpu__time_duration|pipe_|wavefronts_mem_shared|bank_conflicts|issue|inst_executed|warps_active|"
    r"dram__|lts__t_|l1tex__throughput|launch__|sm__throughput|sm__cycles|stall|local"
)
IDENTITY = ("ID", "Kernel Name", "Block Size", "Grid Size", "Device", "CC")


def command(ncu: str, log: Path, program: Sequence[str], kernels: int) -> list[str]:
    """Counters of a program's first ``kernels`` hot kernels, written to ``log``, without clock control."""
    sections = [argument for name in SECTIONS for argument in ("--section", name)]
    return [
        ncu, "--csv", "--page", "raw", "--kernel-name", KERNELS, "--launch-count", str(kernels),
        "--clock-control", "none", "--force-overwrite", "--log-file", str(log), *sections, *program,
    ]  # fmt: skip


def parse(text: str) -> list[dict[str, Any]]:
    """One row per kernel launch: its identity, and the kept metrics with their units.

    The second line of the raw page has the units. Messages of ncu start with "==".
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, *rest = csv.reader(lines[start:])
    if not rest:
        return []
    units = dict(zip(names, rest[0], strict=False))
    found = []
    for values in rest[1:]:
        cells = dict(zip(names, values, strict=False))
        row: dict[str, Any] = {name: cells[name] for name in IDENTITY if name in cells}
        for name, value in cells.items():
            if name not in IDENTITY and value and KEPT.search(name):
                row[f"{name} [{units[name]}]" if units.get(name) else name] = _number(value)
        found.append(row)
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
