"""Predict the cost of the full size from small runs, then measure it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pysupcon.errors import ConfigError
from pysupcon.profiling.calibrate import (
    LossModel,
    Prepared,
    StepModel,
    calibrate_loss,
    calibrate_step,
    prepare,
)
from pysupcon.profiling.cost import largest_dense_rows, largest_rows
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
from pysupcon.profiling.report import Cost, LargestBatch, Profile, Report
from pysupcon.profiling.request import ProfileRequest
from pysupcon.profiling.workload import VIEWS

DENSE_ROWS = 1024
"""Rows at which the dense reference is measured."""
RECORDED_CHUNKS = 8
"""Maximum number of chunks in a trace, which holds every operator of every chunk."""
LARGEST_SCRATCH_ROWS = 2048
"""Rows from which the scratch of a thread of the CPU kernels does not grow."""
SECONDS = 2.0
"""Time for the repetitions of one measurement."""
LEAST_ROWS = 64
"""Least number of rows of a profile."""


def run_profile(request: ProfileRequest) -> Report:
    """Profile the loss and, with an encoder, a training step.

    Raises:
        ConfigError: the memory is too small for the full size, the chunk is larger than N, no batch is within
            the limits, or the name of the encoder is not known.
    """
    if request.chunk is not None and request.n is not None and request.chunk > request.n:
        raise ConfigError(f"--chunk must be at most --n={request.n}, got {request.chunk}")
    available = available_bytes(request.device) if request.memory is None else request.memory
    loss = calibrate_loss(request)
    prepared = None if request.encoder is None else prepare(request)
    step = None if prepared is None else calibrate_step(loss, prepared)
    largest = _largest(step or loss, available, request)
    n = request.n or largest.rows_in_limits
    if n < LEAST_ROWS:
        limits = [] if request.step_seconds is None else [f"--step-seconds {request.step_seconds:g}"]
        limits += [f"{available / 2**30:.3g} GiB of memory"]
        raise ConfigError(f"by prediction no batch of {LEAST_ROWS} rows fits within {' and '.join(limits)}")
    if step is None or prepared is None:
        return Report(request.device, request.describe(n), _profile_loss(loss, n, largest))
    of_loss = _profile_loss(loss, n, _largest(loss, available, request, timed=False))
    of_step = _profile_step(step, prepared, n, largest)
    return Report(request.device, request.describe(n), of_loss, of_step)


def _largest(
    model: LossModel | StepModel, available: int, request: ProfileRequest, *, timed: bool = True
) -> LargestBatch:
    """Search the largest batch within the memory and, if ``timed``, the time of the request."""
    rows = largest_rows(available, model.needed_bytes, VIEWS)
    at = max(rows, LEAST_ROWS)
    found = LargestBatch(
        available_bytes=available,
        rows=rows,
        seconds=model.seconds(rows).seconds if rows else 0.0,
        bytes_a_row=model.needed_bytes(at) / at,
        dense_bytes_a_pair=None,
    )
    limit = request.step_seconds
    if timed and limit is not None:
        found.step_seconds = limit
        found.rows_in_time = largest_rows(limit, lambda n: model.seconds(n).seconds, VIEWS)
        found.rows_in_time_range = (
            largest_rows(limit, lambda n: model.seconds(n).high, VIEWS),
            largest_rows(limit, lambda n: model.seconds(n).low, VIEWS),
        )
    return found


def _profile_loss(model: LossModel, n: int, largest: LargestBatch) -> Profile:
    """Predict and measure forward and backward of the loss."""
    request = model.request
    largest.dense_bytes_a_pair = _dense_bytes_a_pair(request)
    largest.dense_rows = largest_dense_rows(largest.available_bytes, largest.dense_bytes_a_pair)
    flops = request.flops(n)
    forward, backward, both = (part.at(flops) for part in (model.forward, model.backward, model.both))
    profile = Profile(
        calibrated_rows=model.rows,
        calibration_seconds=model.took,
        flops=flops,
        predicted=Cost(forward.seconds, backward.seconds, both.seconds, model.peak_bytes(n)),
        predicted_range=(both.low, both.high),
        largest=largest,
    )
    if request.measure:
        _check_memory(model.needed_bytes(n), request, "the loss")
        work = request.loss_work(n)
        # Threads keep their scratch, so it is counted by itself: after this run it does not grow again.
        before = min(n, LARGEST_SCRATCH_ROWS)
        request.loss_work(before)()
        kept = request.scratch_bytes(before)
        peak = peak_bytes(request.device, work, in_use=True)
        seconds = work.seconds(SECONDS)
        allocated = _record(profile, request, work, request.output / "loss")
        profile.measured = Cost(*seconds, float(max(peak, allocated) + kept))
    return profile


def _profile_step(model: StepModel, prepared: Prepared, n: int, largest: LargestBatch) -> Profile:
    """Predict and measure a training step."""
    request = model.loss.request
    both = model.seconds(n)
    profile = Profile(
        calibrated_rows=model.rows,
        calibration_seconds=model.took,
        flops=request.flops(n),
        predicted=Cost(None, None, both.seconds, model.peak_bytes(n)),
        predicted_range=(both.low, both.high),
        largest=largest,
    )
    if request.measure:
        _check_memory(model.needed_bytes(n), request, "the step")
        work = request.step_work(*prepared, n, request.chunk)
        taken: list[float] = []
        peak = peak_bytes(request.device, lambda: taken.append(work.seconds()))
        rows = n if request.chunk is None else min(n, RECORDED_CHUNKS * request.chunk)
        if rows < n:
            work = request.step_work(*prepared, rows, request.chunk)
        allocated = _record(profile, request, work, request.output / "step")
        profile.recorded_rows = rows
        profile.measured = Cost(None, None, taken[0], float(max(peak, allocated)))
    return profile


def _dense_bytes_a_pair(request: ProfileRequest) -> float:
    """Measured bytes per pair of rows of the dense reference."""
    work = request.loss_work(DENSE_ROWS, "reference")
    work()
    return allocated_peak(request.device, work) / DENSE_ROWS**2


def _check_memory(needed: float, request: ProfileRequest, what: str) -> None:
    free = available_bytes(request.device)
    if needed > free:
        raise ConfigError(
            f"{what} needs {needed / 2**30:.1f} GiB by prediction, but only {free / 2**30:.1f} GiB are "
            "free: use a smaller --n, or --predict"
        )


def _record(profile: Profile, request: ProfileRequest, work: Callable[[], object], folder: Path) -> int:
    """Run once more under the profiler; put the operator table and the files written into ``profile``.

    Returns:
        on the CPU the peak of the memory allocated by torch (elsewhere 0): the least that the resident memory
        must have grown by.
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
            profile.files.append(folder / SNAPSHOT_FILE)
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    profile.files += write_record(found, request.device, folder)
    profile.table = operator_table(found, request.device, rows=15)
    return allocated_in(folder / TRACE_FILE) if request.device.type == "cpu" else 0
