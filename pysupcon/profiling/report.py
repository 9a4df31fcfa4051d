"""Results of a profile and their text form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Cost:
    """Seconds and bytes. A training step has no separate forward and backward."""

    forward: float | None
    backward: float | None
    both: float
    peak_bytes: float
    """Peak memory in addition to the inputs and the weights."""


@dataclass
class LargestBatch:
    """The largest batch that fits into memory and, if there is a limit, into a time."""

    available_bytes: int
    rows: int
    """That fit into memory."""
    seconds: float
    """Predicted time of ``rows``."""
    bytes_a_row: float
    """Peak memory and inputs per row."""
    dense_bytes_a_pair: float | None
    """Measured memory of the dense reference per pair of rows."""
    dense_rows: int | None = None
    step_seconds: float | None = None
    """Limit of the time."""
    rows_in_time: int | None = None
    """Rows that the time allows."""
    rows_in_time_range: tuple[int, int] | None = None
    """The same at the high and the low end of the predicted time."""

    @property
    def rows_in_limits(self) -> int:
        """Rows that fit into memory and time."""
        return self.rows if self.rows_in_time is None else min(self.rows, self.rows_in_time)


@dataclass
class Profile:
    """Profile of a loss or of a training step."""

    calibrated_rows: tuple[int, int]
    calibration_seconds: float
    flops: float
    """Floating-point operations of the loss (4 u)."""
    predicted: Cost
    predicted_range: tuple[float, float]
    """Of the predicted time of forward and backward, or of the step."""
    largest: LargestBatch
    measured: Cost | None = None
    table: str | None = None
    recorded_rows: int | None = None
    """Rows of the trace if they differ from N."""
    files: list[Path] = field(default_factory=list)
    """Files that were written."""


@dataclass
class Report:
    """Results of one command; ``asked`` describes its arguments."""

    device: torch.device
    asked: str
    loss: Profile
    step: Profile | None = None

    @property
    def files(self) -> list[Path]:
        """Files that were written."""
        return self.loss.files + ([] if self.step is None else self.step.files)


def format_report(report: Report) -> str:
    """Return the report as text for a terminal."""
    parts = [f"{report.asked}, on {_device(report.device)}", "", *_profile("loss", report.loss)]
    if report.step is not None:
        parts += ["", *_profile("training step", report.step)]
    return "\n".join(parts)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device} with {threads} thread{'s' if threads > 1 else ''}"


def _profile(name: str, found: Profile) -> list[str]:
    small, large = found.calibrated_rows
    measured = found.measured
    third = "range" if measured is None else "ratio"
    lines = [
        f"{name:<16}{'predicted':>14}{'measured':>14}{third:>22}   (calibrated on this device with {small:,} "
        f"and {large:,} rows, {found.calibration_seconds:.1f} s)"
    ]

    def line(label: str, predicted: float, real: float | None, show: Callable[[float | None], str]) -> str:
        ratio = "" if real is None else f"{real / predicted:>22.2f}"
        return f"{'  ' + label:<16}{show(predicted):>14}{show(real):>14}{ratio}"

    for label in ("forward", "backward", "both"):
        predicted = getattr(found.predicted, label)
        if predicted is not None:
            real = None if measured is None else getattr(measured, label)
            lines.append(line(label, predicted, real, _seconds))
    if measured is None:
        lines[-1] += f"{' to '.join(_seconds(end) for end in found.predicted_range):>22}"
    peak = None if measured is None else measured.peak_bytes
    lines.append(line("peak memory", found.predicted.peak_bytes, peak, _memory))
    if found.predicted.forward is not None:
        rates = [None if cost is None else found.flops / cost.both for cost in (found.predicted, measured)]
        rate = f"{'  4u / time':<16}{_rate(rates[0]):>14}{_rate(rates[1]):>14}"
        lines.append(f"{rate}   (4u: 4 D operations per pair of rows)")
    if measured is not None:
        low, high = found.predicted_range
        lines.append(f"  predicted range of the time: {_seconds(low)} to {_seconds(high)}")
    return [*lines, *_largest(found.largest), *_table(found)]


def _largest(found: LargestBatch) -> list[str]:
    lines = [
        f"  largest batch in {_memory(found.available_bytes)} of memory: {found.rows:,} rows "
        f"({found.bytes_a_row:,.0f} bytes per row with its input), {_seconds(found.seconds)}"
    ]
    if found.rows_in_time is not None and found.rows_in_time_range is not None:
        low, high = found.rows_in_time_range
        lines.append(
            f"  largest batch in {_seconds(found.step_seconds)}: {found.rows_in_time:,} rows "
            f"({low:,} to {high:,} by the range of the predicted time)"
        )
        limit = "memory" if found.rows < found.rows_in_time else "time"
        lines.append(f"  largest batch in both: {found.rows_in_limits:,} rows, limited by the {limit}")
    if found.dense_bytes_a_pair is not None and found.dense_rows is not None:
        lines.append(
            f"  dense loss: {found.dense_rows:,} rows ({found.dense_bytes_a_pair:.1f} bytes per pair of rows)"
        )
    return lines


def _table(found: Profile) -> list[str]:
    if found.table is None:
        return []
    note = "" if found.recorded_rows is None else f" of {found.recorded_rows:,} images"
    return ["", f"  operators by their own time, one run{note}:", found.table.rstrip()]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, factor, unit in (
        (1e-3, 1e6, "us"),
        (1.0, 1e3, "ms"),
        (600.0, 1.0, "s"),
        (36_000.0, 1 / 60, "min"),
    ):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 3600:,.4g} h"


def _memory(value: float | None) -> str:
    if value is None:
        return "-"
    unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if value >= s), ("KiB", 2**10))
    return f"{value / size:.4g} {unit}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:,.0f} GFLOP/s"
