"""Results of a profile and their text form."""

from __future__ import annotations

from dataclasses import dataclass

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
    """The largest batch that fits into memory."""

    available_bytes: int
    rows: int
    seconds: float
    """Predicted time."""
    bytes_a_row: float
    """Peak memory and inputs per row."""
    dense_bytes_a_pair: float | None
    """Measured memory of the dense reference per pair of rows."""
    dense_rows: int | None = None


@dataclass
class Profile:
    """Profile of a loss or of a training step."""

    calibrated_rows: tuple[int, int]
    flops: float
    """Floating-point operations of the loss (4 u)."""
    predicted: Cost
    largest: LargestBatch
    measured: Cost | None = None
    table: str | None = None
    recorded_rows: int | None = None
    """Rows of the trace if they differ from N."""


@dataclass
class Report:
    """Results of one command; ``asked`` describes its arguments."""

    device: torch.device
    asked: str
    loss: Profile
    step: Profile | None = None


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
    lines = [f"{name:<16}{'predicted':>14}{'measured':>14}   (predicted from {small:,} and {large:,} rows)"]
    for label in ("forward", "backward", "both"):
        predicted = getattr(found.predicted, label)
        if predicted is None:
            continue
        measured = None if found.measured is None else getattr(found.measured, label)
        lines.append(f"{'  ' + label:<16}{_seconds(predicted):>14}{_seconds(measured):>14}")
    measured = None if found.measured is None else found.measured.peak_bytes
    lines.append(f"{'  peak memory':<16}{_memory(found.predicted.peak_bytes):>14}{_memory(measured):>14}")
    if found.predicted.forward is not None:
        rates = [
            None if cost is None else found.flops / cost.both for cost in (found.predicted, found.measured)
        ]
        rate = f"{'  4u / time':<16}{_rate(rates[0]):>14}{_rate(rates[1]):>14}"
        lines.append(f"{rate}   (4u: 4 D operations per pair of rows)")
    return [*lines, *_largest(found.largest), *_table(found)]


def _largest(found: LargestBatch) -> list[str]:
    line = (
        f"  largest batch in {_memory(found.available_bytes)} of free memory: {found.rows:,} rows "
        f"({found.bytes_a_row:,.0f} bytes per row with its input), {_seconds(found.seconds)}"
    )
    if found.dense_bytes_a_pair is None or found.dense_rows is None:
        return [line]
    return [
        line,
        f"  dense loss: {found.dense_rows:,} rows ({found.dense_bytes_a_pair:.1f} bytes per pair of rows)",
    ]


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
