"""Predict the cost of the full size from two small runs, then measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pysupcon.errors import ConfigError
from pysupcon.profiling.cost import Line, largest_dense_rows, largest_rows, loss_flops
from pysupcon.profiling.memory import available_bytes, peak_bytes
from pysupcon.profiling.recorder import (
    SNAPSHOT_FILE,
    TRACE_FILE,
    allocated_in,
    allocated_peak,
    operator_table,
    recorded,
    write_record,
)
from pysupcon.profiling.report import Cost, LargestBatch, Profile
from pysupcon.profiling.workload import Encoder, LossWork, StepWork, loss_function, unit_rows

LOSS_ROWS = {"cpu": 4096, "cuda": 32_768}
"""Rows of the larger of the two small runs of a loss."""
STEP_ROWS = {"cpu": 256, "cuda": 1024}
"""Images of the larger of the two small runs of a step without chunks."""
DENSE_ROWS = 1024
"""Rows at which the dense reference is measured."""
RECORDED_CHUNKS = 8
"""Maximum number of chunks in a trace, which holds every operator of every chunk."""
SECONDS = 2.0
"""Time for the repetitions of one measurement."""


@dataclass(frozen=True)
class ProfileRequest:
    """Checked arguments of a profile."""

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
    """Run the full size too."""
    output: Path

    def describe(self) -> str:
        """Return the arguments as text."""
        return (
            f"{self.loss}, N={self.n:,}, D={self.dim}, {self.classes} classes, "
            f"{str(self.dtype).removeprefix('torch.')}, temperature {self.temperature:g}, "
            f"backend {self.backend}"
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its label and sample number."""
        return self.dim * self.dtype.itemsize + 16


def profile_loss(request: ProfileRequest) -> Profile:
    """Profile forward and backward of the loss.

    Raises:
        ConfigError: the memory is too small for the full size.
    """
    available = available_bytes(request.device)
    large = _even(min(LOSS_ROWS.get(request.device.type, 4096), request.n // 2))
    small = _even(large // 2)
    _loss_work(request, small)()  # warm up libraries, threads and the kernels' scratch memory
    runs = [_loss_work(request, n) for n in (small, large)]
    times = [work.seconds(SECONDS / 4) for work in runs]
    peaks = [float(allocated_peak(request.device, work)) for work in runs]
    flops = [_flops(request, n) for n in (small, large)]
    lines = [Line.through((flops[0], times[0][part]), (flops[1], times[1][part])) for part in range(3)]
    memory = Line.through((small, peaks[0]), (large, peaks[1]))
    a_pair = _dense_bytes_a_pair(request)
    work_flops = _flops(request, request.n)
    forward, backward, both = (line.at(work_flops) for line in lines)
    profile = Profile(
        calibrated_rows=(small, large),
        flops=work_flops,
        predicted=Cost(forward, backward, both, memory.at(request.n)),
        largest=LargestBatch(available, 0, 0.0, memory.slope + request.row_bytes, a_pair),
    )
    rows_bytes = memory
    if request.measure:
        _check_memory(memory.at(request.n) + request.n * request.row_bytes, available, "the loss")
        work = _loss_work(request, request.n)
        peak = peak_bytes(request.device, work)
        seconds = work.seconds(SECONDS)
        profile.table, allocated = _record(request, work, request.output / "loss")
        peak = max(peak, allocated)
        profile.measured = Cost(*seconds, float(peak))
        rows_bytes = Line.through((small, peaks[0]), (request.n, float(peak)))
    rows = largest_rows(available, rows_bytes, request.row_bytes)
    profile.largest.rows = rows
    profile.largest.seconds = lines[2].at(_flops(request, rows))
    profile.largest.bytes_a_row = rows_bytes.slope + request.row_bytes
    profile.largest.dense_rows = largest_dense_rows(available, a_pair)
    return profile


def profile_step(request: ProfileRequest, loss: Profile) -> Profile:
    """Profile a training step. Its time is linear in the images, plus the time of the pairs.

    Args:
        request: the arguments.
        loss: profile of the loss; gives the time and the memory of the pairs.

    Raises:
        ConfigError: the chunk does not fit --n, or the memory is too small for the full size.
    """
    available = available_bytes(request.device)
    torch.manual_seed(0)
    assert request.encoder is not None
    encoder = Encoder(request.encoder, request.dim, request.image_size).to(request.device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3, momentum=0.9)
    if request.chunk is None:
        large = _even(min(STEP_ROWS.get(request.device.type, 64), request.n // 2))
        small = _even(large // 2)
    else:
        small, large = 2 * request.chunk, 4 * request.chunk
        if request.n < 2 * large or request.chunk % 2:
            raise ConfigError(
                f"--chunk must be even and at most an eighth of --n={request.n}, got {request.chunk}"
            )
    _step_work(request, encoder, optimizer, small)()  # warm up libraries and the optimizer's state
    runs = [_step_work(request, encoder, optimizer, n) for n in (small, large)]
    times = [work.seconds() for work in runs]
    peaks = [float(peak_bytes(request.device, work)) for work in runs]
    time = Line.through((small, times[0]), (large, times[1]))
    # With chunks the encoder needs the memory of one chunk: only the loss and its rows grow with N.
    a_row = loss.largest.bytes_a_row
    memory = Line.through((small, peaks[0]), (large, peaks[1]))
    if request.chunk is not None:
        memory = Line(max(peaks[1] - a_row * large, 0.0), a_row)
    image_bytes = 12 * request.image_size**2 + 16
    pairs = Line(0.0, (loss.measured or loss.predicted).both / loss.flops)

    def seconds(n: int) -> float:
        return time.at(n) + pairs.at(_flops(request, n))

    predicted = seconds(request.n)
    profile = Profile(
        calibrated_rows=(small, large),
        flops=loss.flops,
        predicted=Cost(None, None, predicted, memory.at(request.n)),
        largest=LargestBatch(available, 0, 0.0, memory.slope + image_bytes, None),
    )
    del runs
    if request.measure:
        _check_memory(memory.at(request.n) + request.n * image_bytes, available, "the step")
        work = _step_work(request, encoder, optimizer, request.n)
        taken: list[float] = []
        peak = peak_bytes(request.device, lambda: taken.append(work.seconds()))
        rows = request.n if request.chunk is None else min(request.n, RECORDED_CHUNKS * request.chunk)
        if rows < request.n:
            work = _step_work(request, encoder, optimizer, rows)
        profile.table, allocated = _record(request, work, request.output / "step")
        profile.recorded_rows = rows
        peak = max(peak, allocated)
        profile.measured = Cost(None, None, taken[0], float(peak))
        if request.chunk is None:
            memory = Line.through((small, peaks[0]), (request.n, float(peak)))
        else:
            memory = Line(max(peak - a_row * request.n, 0.0), a_row)
    profile.largest.rows = largest_rows(available, memory, image_bytes)
    profile.largest.seconds = seconds(profile.largest.rows)
    profile.largest.bytes_a_row = memory.slope + image_bytes
    return profile


def _even(n: int) -> int:
    return max(n // 2 * 2, 2)


def _flops(request: ProfileRequest, n: int) -> float:
    classes = n // 2 if request.loss == "infonce" else request.classes
    return loss_flops(request.loss, n, request.dim, classes)


def _loss_work(request: ProfileRequest, n: int, backend: str | None = None) -> LossWork:
    inputs = unit_rows(n, request.dim, request.classes, dtype=request.dtype, device=request.device, seed=0)
    return LossWork(loss_function(request.loss, request.temperature, backend or request.backend), inputs)


def _step_work(
    request: ProfileRequest, encoder: Encoder, optimizer: torch.optim.Optimizer, n: int
) -> StepWork:
    inputs = unit_rows(n, request.dim, request.classes, dtype=request.dtype, device=request.device, seed=0)
    images = torch.randn(n, 3, request.image_size, request.image_size, device=request.device)
    loss = loss_function(request.loss, request.temperature, request.backend)
    return StepWork(encoder, optimizer, loss, images, inputs, request.chunk)


def _dense_bytes_a_pair(request: ProfileRequest) -> float:
    """Measured bytes per pair of rows of the dense reference."""
    work = _loss_work(request, DENSE_ROWS, "reference")
    work()
    return allocated_peak(request.device, work) / DENSE_ROWS**2


def _check_memory(needed: float, available: int, what: str) -> None:
    if needed > available:
        raise ConfigError(
            f"{what} needs {needed / 2**30:.1f} GiB by prediction, but only {available / 2**30:.1f} GiB are "
            "free: use a smaller --n, or --predict"
        )


def _record(request: ProfileRequest, work: Callable[[], object], folder: Path) -> tuple[str, int]:
    """Run once more under the profiler.

    Returns:
        the operator table, and on the CPU the peak of the memory allocated by torch (elsewhere 0): the least
        that the resident memory must have grown by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = request.device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        with recorded(request.device) as found:
            work()
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT_FILE))
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    write_record(found, request.device, folder)
    allocated = allocated_in(folder / TRACE_FILE) if request.device.type == "cpu" else 0
    return operator_table(found, request.device, rows=15), allocated
