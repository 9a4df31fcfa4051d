"""Measure small runs, about a second each for the loss and the encoder, and predict larger ones from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pysupcon.profiling.cost import LEAST_ERROR, Estimate, Line, TimeModel, Timing
from pysupcon.profiling.memory import peak_bytes
from pysupcon.profiling.recorder import allocated_peak
from pysupcon.profiling.request import ProfileRequest
from pysupcon.profiling.workload import VIEWS, Encoder, Seconds, StepSeconds, StepWork

LOSS_ROWS = {"cpu": 4096, "cuda": 32_768}
"""Rows of the larger of the two small runs of a loss."""
STEP_ROWS = {"cpu": 256, "cuda": 1024}
"""Maximum images of the smaller of the two small runs of a step."""
FIRST_IMAGES = 8
"""Images of the first run of a step; doubled until a step is long enough to time."""
STEP_SECONDS = 0.08
"""Time from which a step is long enough."""
CALIBRATION_SECONDS = 0.7
"""Time for the repetitions of one calibration."""
WITHOUT_CACHES = 0.5
"""Share by which an encoder may be slower with many images at once: activations leave the caches, and memory
is mapped in each step."""
LEAST_ROUNDS = 3
"""Least number of repetitions, except if one takes longer than all should."""


@dataclass(frozen=True)
class LossModel:
    """Predicts forward and backward of a loss of any number of rows."""

    request: ProfileRequest
    rows: tuple[int, int]
    """Rows of the two runs."""
    forward: TimeModel
    backward: TimeModel
    both: TimeModel
    tensors: Line
    """Peak of the memory in tensors by rows, for the dense reference by pairs of rows; without the CPU
    kernels with the buffers of libraries."""
    took: float
    """Seconds of the calibration."""

    def seconds(self, n: int) -> Estimate:
        """Return the time of forward and backward of N rows."""
        return self.both.at(self.request.flops(n))

    def peak_bytes(self, n: int) -> float:
        """Return the peak memory of N rows in addition to the inputs."""
        return self.tensors.at(_memory_size(self.request, n)) + self.request.kernel_bytes(n)

    def needed_bytes(self, n: int) -> float:
        """Return the memory of N rows with the inputs."""
        return self.peak_bytes(n) + n * self.request.row_bytes


@dataclass(frozen=True)
class StepModel:
    """Predicts a training step of any number of images.

    Without chunks its time is linear in the images, with chunks in the chunks: each is encoded twice, once
    without gradients. The optimizer and the loss are added.
    """

    loss: LossModel
    rows: tuple[int, int]
    train: TimeModel
    """Forward and backward of the encoder, by images."""
    encode: TimeModel
    """Forward without gradients, by images."""
    update: Timing
    """Step of the optimizer."""
    memory: Line
    """Peak memory of a step without chunks, by images."""
    took: float

    def seconds(self, n: int) -> Estimate:
        """Return the time of a step of N images."""
        chunk = self.loss.request.chunk
        if chunk is None or n <= chunk:  # GradCache encodes a single chunk once
            encoder = self.train.at(n, WITHOUT_CACHES if n > self.rows[1] else LEAST_ERROR)
        else:
            encoder = self.train.at(chunk).plus(self.encode.at(chunk)).times(n / chunk)
        update = Estimate(self.update.median, *self.update.quartiles)
        return encoder.plus(update).plus(self.loss.seconds(n))

    def peak_bytes(self, n: int) -> float:
        """Return the peak memory of N images in addition to the images and the weights."""
        request = self.loss.request
        if request.chunk is None or n <= request.chunk:
            return self.memory.at(n) + request.kernel_bytes(n)
        # With chunks the encoder needs the memory of one chunk: only the loss and its rows grow with N.
        return self.memory.at(request.chunk) + self.loss.needed_bytes(n)

    def needed_bytes(self, n: int) -> float:
        """Return the memory of N images with the images."""
        return self.peak_bytes(n) + n * self.loss.request.image_bytes


class Prepared(NamedTuple):
    """An encoder with its optimizer, for runs of a step."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer


def prepare(request: ProfileRequest) -> Prepared:
    """Build the encoder.

    Raises:
        ConfigError: its name is not known.
    """
    assert request.encoder is not None
    torch.manual_seed(0)
    encoder = Encoder(request.encoder, request.dim, request.image_size).to(request.device)
    return Prepared(encoder, torch.optim.SGD(encoder.parameters(), lr=1e-3, momentum=0.9))


def calibrate_loss(request: ProfileRequest) -> LossModel:
    """Measure the loss at two small sizes."""
    start = time.perf_counter()
    most = LOSS_ROWS.get(request.device.type, 4096)
    large = _even(most if request.n is None else min(most, request.n // 2))
    small = _even(large // 2)
    works = [request.loss_work(n) for n in (small, large)]
    works[0]()  # libraries, threads and the scratch of the kernels
    runs: tuple[list[Seconds], list[Seconds]] = ([], [])
    repeat(lambda: runs[0].append(works[0].once()), lambda: runs[1].append(works[1].once()))
    work_done = request.flops(small), request.flops(large)
    forward, backward, both = (
        TimeModel(
            *(Timing(w, [run[part] for run in found]) for w, found in zip(work_done, runs, strict=True))
        )
        for part in range(3)
    )
    peaks = [float(allocated_peak(request.device, work)) for work in works]
    sizes = _memory_size(request, small), _memory_size(request, large)
    tensors = Line.through((sizes[0], peaks[0]), (sizes[1], peaks[1]))
    if request.resolved_backend != "cpu":  # the kernels' buffers are known; those of torch are not
        tensors = tensors.times(_buffer_share(request, works[1], peaks[1]))
    took = time.perf_counter() - start
    return LossModel(request, (small, large), forward, backward, both, tensors, took)


def calibrate_step(loss: LossModel, prepared: Prepared) -> StepModel:
    """Measure the encoder with few images."""
    request = loss.request
    start = time.perf_counter()
    most = STEP_ROWS.get(request.device.type, 64) if request.chunk is None else max(request.chunk // 2, 2)
    if request.n is not None:
        most = min(most, request.n // 4)
    small = first_long(lambda n: _step_seconds(request, prepared, n), most)
    sizes = small, 2 * small
    works = [request.step_work(*prepared, n, None) for n in sizes]
    for work in works:
        work.parts()  # libraries prepare the shapes of a new size
    parts: tuple[list[StepSeconds], list[StepSeconds]] = ([], [])
    repeat(lambda: parts[0].append(works[0].parts()), lambda: parts[1].append(works[1].parts()))
    train, encode = (
        TimeModel(*(Timing(n, [run[part] for run in found]) for n, found in zip(sizes, parts, strict=True)))
        for part in (StepSeconds._fields.index("train"), StepSeconds._fields.index("encode"))
    )
    update = Timing(1, [run.update for run in parts[1]])
    memory = _step_memory(request, works, sizes)
    return StepModel(loss, sizes, train, encode, update, memory, time.perf_counter() - start)


def _step_memory(request: ProfileRequest, works: Sequence[StepWork], sizes: tuple[int, int]) -> Line:
    """Return the peak memory by images.

    Tensors are counted exactly. Buffers of the libraries for convolutions are not tensors: the resident
    memory of the larger run shows their share.
    """
    peaks = [float(allocated_peak(request.device, work)) for work in works]
    tensors = Line.through((sizes[0], peaks[0]), (sizes[1], peaks[1]))
    return tensors.times(_buffer_share(request, works[1], peaks[1]))


def _buffer_share(request: ProfileRequest, work: Callable[[], object], tensors: float) -> float:
    """Return resident memory relative to that in tensors, at least 1."""
    resident = min(peak_bytes(request.device, work, in_use=True) for _ in range(2))
    return max(resident / tensors, 1.0)


def repeat(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Run two functions in turns for CALIBRATION_SECONDS, so that other work on the machine slows both."""
    start = time.perf_counter()
    for done in range(1, 21):
        first()
        second()
        spent = time.perf_counter() - start
        if spent > CALIBRATION_SECONDS and (done >= LEAST_ROUNDS or spent > 2 * CALIBRATION_SECONDS):
            return


def first_long(seconds: Callable[[int], float], most: int) -> int:
    """Return the first number of images, doubled from FIRST_IMAGES, whose step takes STEP_SECONDS.

    Args:
        seconds: time of a step with a number of images.
        most: maximum result.
    """
    images = min(FIRST_IMAGES, most)
    while 2 * images <= most and seconds(images) < STEP_SECONDS:
        images *= 2
    return images


def _step_seconds(request: ProfileRequest, prepared: Prepared, n: int) -> float:
    work = request.step_work(*prepared, n, None)
    work()
    return work.seconds()


def _memory_size(request: ProfileRequest, n: int) -> float:
    return float(n * n if request.resolved_backend == "reference" else n)


def _even(n: int) -> int:
    return max(n // VIEWS * VIEWS, VIEWS)
