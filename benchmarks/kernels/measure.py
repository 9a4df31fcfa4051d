"""Measures the time and the peak memory of a loss, forward and backward."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks import fault_tolerance
from benchmarks.kernels.cases import Problem, make_inputs
from pysupcon.profiling.memory import peak_bytes
from pysupcon.profiling.workload import Inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.peers import Implementation

Key = TypeVar("Key")
PROBE = Path(__file__).with_name("memory_probe.py")
SLOW = 2.0
"""A call that takes longer (in seconds) is not preceded by a warm-up call."""


class Result(NamedTuple):
    """The result of one call."""

    loss: Tensor
    gradient: Tensor


@dataclass
class Timing:
    """Seconds of each repetition."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, seconds: tuple[float, float]) -> None:
        """Add the forward and backward seconds of one repetition."""
        self.forward.append(seconds[0])
        self.backward.append(seconds[1])

    @property
    def both(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians, and the quartiles of forward plus backward; empty without repetitions."""
        both = sorted(self.both)
        if not both:
            return {}
        return {
            "forward_s": statistics.median(self.forward),
            "backward_s": statistics.median(self.backward),
            "both_s": statistics.median(both),
            "quartiles_s": [both[len(both) // 4], both[(3 * len(both)) // 4]],
            "repetitions": len(both),
        }


def evaluate(function: Implementation, inputs: Inputs) -> Result:
    """One forward and backward without timing."""
    inputs.features.grad = None
    loss = function(inputs)
    loss.backward()
    gradient = inputs.features.grad
    assert gradient is not None
    inputs.features.grad = None
    return Result(loss.detach(), gradient)


def _timed(function: Implementation, inputs: Inputs) -> tuple[float, float]:
    """Seconds of forward and backward; on a GPU measured with CUDA events."""
    inputs.features.grad = None
    if inputs.features.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        marks[0].record()
        loss = function(inputs)
        marks[1].record()
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        times = marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
    else:
        start = time.perf_counter()
        loss = function(inputs)
        middle = time.perf_counter()
        loss.backward()
        times = middle - start, time.perf_counter() - middle
    inputs.features.grad = None
    return times


def interleaved(
    functions: Mapping[Key, Implementation],
    inputs: Sequence[Inputs],
    *,
    seconds: float,
    least: int = 3,
    most: int = 50,
    timings: dict[Key, Timing] | None = None,
) -> tuple[dict[Key, Timing], dict[Key, str]]:
    """Time all functions in turns, so that other load on the machine affects all of them.

    Args:
        functions: the functions by name.
        inputs: sets of inputs, also used in turns.
        seconds: time for the repetitions of one function.
        least: minimal number of repetitions.
        most: maximal number of repetitions.
        timings: filled after each repetition, so that the caller has them after an interruption.

    Returns:
        The timings, and the error messages of the functions that failed.

    Raises:
        DeviceLost: see :func:`~benchmarks.fault_tolerance.attempt`.
    """
    timings = {} if timings is None else timings
    failures: dict[Key, str] = {}
    wanted = {}
    device = inputs[0].features.device.type

    def timed(name: Key, at: Inputs) -> tuple[float, float] | None:
        found, message = fault_tolerance.attempt(lambda: _timed(functions[name], at), device)
        at.features.grad = None
        if found is None:
            failures[name] = message
        return found

    for name in functions:
        timings[name] = Timing()
        first = timed(name, inputs[0])
        if first is not None and sum(first) >= SLOW:
            timings[name].add(first)
        elif first is not None:
            first = timed(name, inputs[-1])
        if first is not None:
            wanted[name] = max(least, min(most, int(seconds / max(sum(first), 1e-9))))
    for repetition in range(max(wanted.values(), default=0)):
        for name, count in wanted.items():
            if name not in failures and len(timings[name].forward) < count:
                found = timed(name, inputs[repetition % len(inputs)])
                if found is not None:
                    timings[name].add(found)
    return timings, failures


def median_seconds(call: Callable[[], object], repetitions: int) -> float:
    """Median seconds of a call on the CPU, after one warm-up call."""
    call()
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def product_rate(rows: int, inner: int, columns: int, repetitions: int = 5) -> float:
    """Floating-point operations per second of torch.mm on float32 [rows, inner] by [inner, columns]."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return 2.0 * rows * inner * columns / median_seconds(lambda: torch.mm(a, b, out=out), repetitions)


def digest(result: Result) -> str:
    """Hash of the bits of the loss and the gradient."""
    found = hashlib.sha256()
    for tensor in result:
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the context; None: do not change it."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(implementation: str, function: Implementation, problem: Problem) -> int:
    """Peak memory of forward and backward in bytes, in addition to the inputs.

    On the CPU: the resident set of a new process (memory_probe.py). On a GPU: the allocator's statistics.

    Raises:
        MemoryError: the process failed, usually for lack of memory.
    """
    if problem.device == "cuda":
        inputs = make_inputs(problem, seed=0)
        evaluate(function, inputs)
        torch.cuda.empty_cache()
        return peak_bytes(inputs.features.device, lambda: evaluate(function, inputs))
    description = json.dumps(problem.to_dict())
    # By default glibc keeps freed blocks of up to 32 MiB. Return them, so that only memory in use is counted.
    returned = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    environment = os.environ | returned | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, str(PROBE), implementation, description],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MemoryError(f"{implementation}: {done.stderr.strip() or f'status {done.returncode}'}")
    return int(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])
