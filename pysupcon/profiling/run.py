"""Predicts from two small runs, then measures the full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pysupcon.errors import ConfigError
from pysupcon.profiling.cost import Line, largest_dense_rows, largest_rows, loss_flops
from pysupcon.profiling.memory import available_bytes, peak_bytes
from pysupcon.profiling.recorder import SNAPSHOT_FILE, operator_table, recorded, write_record
from pysupcon.profiling.report import Cost, Largest, Profile
from pysupcon.profiling.workload import Encoder, LossWork, StepWork, loss_function, unit_rows

LOSS_ROWS = {"cpu": 4096, "cuda": 32_768}
"""Rows of the larger of the two small runs of a loss"""
STEP_ROWS = {"cpu": 256, "cuda": 1024}
"""Images of the larger of the two small runs of a step without chunks"""
DENSE_ROWS = 1024
RECORDED_CHUNKS = 8
"""A step of more chunks than this is recorded at this many: a trace holds every operator of every chunk"""
SECONDS = 2.0
"""for the repetitions of one timing"""


@dataclass(frozen=True)
class Asked:
    """What to profile, checked."""

    loss: str
    n: int
    dim: int
    classes: int
    temperature: float
    dtype: torch.dtype
    device: torch.device
    backend: str
    encoder: str | None
    image_size: int
    chunk: int | None
    measure: bool
    """run the full size too"""
    output: Path

    def describe(self) -> str:
        return (
            f"{self.loss}, N={self.n:,}, D={self.dim}, {self.classes} classes, "
            f"{str(self.dtype).removeprefix('torch.')}, temperature {self.temperature:g}, "
            f"backend {self.backend}"
        )

    @property
    def row_bytes(self) -> int:
        """Of a row with its label and sample."""
        return self.dim * self.dtype.itemsize + 16


def profile_loss(asked: Asked) -> Profile:
    """Forward and backward of the loss alone."""
    available = available_bytes(asked.device)
    large = _even(min(LOSS_ROWS.get(asked.device.type, 4096), asked.n // 2))
    small = _even(large // 2)
    _loss_work(asked, small)()  # libraries, threads and the kernels' scratch
    runs = [_loss_work(asked, n) for n in (small, large)]
    times = [work.seconds(SECONDS / 4) for work in runs]
    peaks = [float(peak_bytes(asked.device, work)) for work in runs]
    flops = [_flops(asked, n) for n in (small, large)]
    lines = [Line.through((flops[0], times[0][part]), (flops[1], times[1][part])) for part in range(3)]
    memory = Line.through((small, peaks[0]), (large, peaks[1]))
    a_pair = _dense_bytes_a_pair(asked)
    work_flops = _flops(asked, asked.n)
    forward, backward, both = (line.at(work_flops) for line in lines)
    profile = Profile(
        calibrated_rows=(small, large),
        flops=work_flops,
        predicted=Cost(forward, backward, both, memory.at(asked.n)),
        largest=Largest(available, 0, 0.0, memory.slope + asked.row_bytes, a_pair),
    )
    rows_bytes = memory
    if asked.measure:
        _refuse_too_large(memory.at(asked.n) + asked.n * asked.row_bytes, available, "the loss")
        work = _loss_work(asked, asked.n)
        peak = peak_bytes(asked.device, work)
        seconds = work.seconds(SECONDS)
        profile.measured = Cost(*seconds, float(peak))
        profile.table = _record(asked, work, asked.output / "loss")
        rows_bytes = Line.through((small, peaks[0]), (asked.n, float(peak)))
    rows = largest_rows(available, rows_bytes, asked.row_bytes)
    profile.largest.rows = rows
    profile.largest.seconds = lines[2].at(_flops(asked, rows))
    profile.largest.bytes_a_row = rows_bytes.slope + asked.row_bytes
    profile.largest.dense_rows = largest_dense_rows(available, a_pair)
    return profile


def profile_step(asked: Asked, loss: Profile) -> Profile:
    """A training step: a straight line for the images, and the pairs, whose time ``loss`` knows."""
    available = available_bytes(asked.device)
    torch.manual_seed(0)
    assert asked.encoder is not None
    encoder = Encoder(asked.encoder, asked.dim, asked.image_size).to(asked.device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3, momentum=0.9)
    if asked.chunk is None:
        large = _even(min(STEP_ROWS.get(asked.device.type, 64), asked.n // 2))
        small = _even(large // 2)
    else:
        small, large = 2 * asked.chunk, 4 * asked.chunk
        if asked.n < 2 * large or asked.chunk % 2:
            raise ConfigError(
                f"--chunk must be even and at most an eighth of --n={asked.n}, got {asked.chunk}"
            )
    _step_work(asked, encoder, optimizer, small)()  # libraries, and the optimiser's state
    runs = [_step_work(asked, encoder, optimizer, n) for n in (small, large)]
    times = [work.seconds() for work in runs]
    peaks = [float(peak_bytes(asked.device, work)) for work in runs]
    time = Line.through((small, times[0]), (large, times[1]))
    # In chunks the encoder's memory is that of a chunk: only the loss and its rows grow with N.
    a_row = loss.largest.bytes_a_row
    memory = Line.through((small, peaks[0]), (large, peaks[1]))
    if asked.chunk is not None:
        memory = Line(max(peaks[1] - a_row * large, 0.0), a_row)
    image_bytes = 12 * asked.image_size**2 + 16
    pairs = Line(0.0, (loss.measured or loss.predicted).both / loss.flops)

    def seconds(n: int) -> float:
        return time.at(n) + pairs.at(_flops(asked, n))

    predicted = seconds(asked.n)
    profile = Profile(
        calibrated_rows=(small, large),
        flops=loss.flops,
        predicted=Cost(None, None, predicted, memory.at(asked.n)),
        largest=Largest(available, 0, 0.0, memory.slope + image_bytes, None),
    )
    del runs
    if asked.measure:
        _refuse_too_large(memory.at(asked.n) + asked.n * image_bytes, available, "the step")
        work = _step_work(asked, encoder, optimizer, asked.n)
        taken: list[float] = []
        peak = peak_bytes(asked.device, lambda: taken.append(work.seconds()))
        profile.measured = Cost(None, None, taken[0], float(peak))
        if asked.chunk is None:
            memory = Line.through((small, peaks[0]), (asked.n, float(peak)))
        else:
            memory = Line(max(peak - a_row * asked.n, 0.0), a_row)
        rows = asked.n if asked.chunk is None else min(asked.n, RECORDED_CHUNKS * asked.chunk)
        if rows < asked.n:
            work = _step_work(asked, encoder, optimizer, rows)
        profile.table = _record(asked, work, asked.output / "step")
        profile.recorded_rows = rows
    profile.largest.rows = largest_rows(available, memory, image_bytes)
    profile.largest.seconds = seconds(profile.largest.rows)
    profile.largest.bytes_a_row = memory.slope + image_bytes
    return profile


def _even(n: int) -> int:
    return max(n // 2 * 2, 2)


def _flops(asked: Asked, n: int) -> float:
    classes = n // 2 if asked.loss == "infonce" else asked.classes
    return loss_flops(asked.loss, n, asked.dim, classes)


def _loss_work(asked: Asked, n: int, backend: str | None = None) -> LossWork:
    inputs = unit_rows(n, asked.dim, asked.classes, dtype=asked.dtype, device=asked.device, seed=0)
    return LossWork(loss_function(asked.loss, asked.temperature, backend or asked.backend), inputs)


def _step_work(asked: Asked, encoder: Encoder, optimizer: torch.optim.Optimizer, n: int) -> StepWork:
    inputs = unit_rows(n, asked.dim, asked.classes, dtype=asked.dtype, device=asked.device, seed=0)
    images = torch.randn(n, 3, asked.image_size, asked.image_size, device=asked.device)
    loss = loss_function(asked.loss, asked.temperature, asked.backend)
    return StepWork(encoder, optimizer, loss, images, inputs, asked.chunk)


def _dense_bytes_a_pair(asked: Asked) -> float:
    """Of the dense reference, measured."""
    work = _loss_work(asked, DENSE_ROWS, "reference")
    work()
    return peak_bytes(asked.device, work) / DENSE_ROWS**2


def _refuse_too_large(needed: float, available: int, what: str) -> None:
    if needed > available:
        raise ConfigError(
            f"{what} needs {needed / 2**30:.1f} GiB by prediction and {available / 2**30:.1f} GiB are free: "
            "take a smaller --n, or --predict"
        )


def _record(asked: Asked, work: Callable[[], object], folder: Path) -> str:
    """Traces once more; the table of operators."""
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = asked.device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        with recorded(asked.device) as found:
            work()
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT_FILE))
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    write_record(found, asked.device, folder)
    return operator_table(found, asked.device, rows=15)
