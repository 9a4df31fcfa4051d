"""Time and peak memory of a loss, forward and backward."""

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

from benchmarks import guard
from benchmarks.kernels.cases import Problem, make_inputs
from pysupcon.profiling.memory import peak_bytes
from pysupcon.profiling.workload import Inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.peers import Implementation

Key = TypeVar("Key")
PROBE = Path(__file__).with_name("memory_probe.py")
SLOW = 2.0
"""seconds; a call that takes longer needs no other call to warm it up"""


class Result(NamedTuple):
    """Of one call."""

    loss: Tensor
    gradient: Tensor


@dataclass
class Timing:
    """Seconds of every repetition."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, seconds: tuple[float, float]) -> None:
        """One repetition's forward and backward."""
        self.forward.append(seconds[0])
        self.backward.append(seconds[1])

    @property
    def both(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians, and the quartiles of forward plus backward; empty without a repetition."""
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
    """One call, untimed."""
    inputs.features.grad = None
    loss = function(inputs)
    loss.backward()
    gradient = inputs.features.grad
    assert gradient is not None
    inputs.features.grad = None
    return Result(loss.detach(), gradient)


def _timed(function: Implementation, inputs: Inputs) -> tuple[float, float]:
    """Seconds of forward and backward; by events on a GPU."""
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
    """Times all functions in turns, so that what disturbs the machine disturbs them alike.

    Args:
        inputs: taken in turns too.
        seconds: for the repetitions of one function.
        least, most: repetitions.
        timings: filled as the repetitions go, for a caller that wants to have them after an interruption.

    Returns:
        The timings, and what went wrong with those functions that failed; the others went on without them.

    Raises:
        DeviceLost: see :func:`~benchmarks.guard.attempt`.
    """
    timings = {} if timings is None else timings
    failures: dict[Key, str] = {}
    wanted = {}
    device = inputs[0].features.device.type

    def timed(name: Key, at: Inputs) -> tuple[float, float] | None:
        found, words = guard.attempt(lambda: _timed(functions[name], at), device)
        at.features.grad = None
        if found is None:
            failures[name] = words
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
    """Of a call on the CPU, after one for warming up."""
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
    """Of the bits of loss and gradient."""
    found = hashlib.sha256()
    for tensor in result:
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch; None: as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(implementation: str, function: Implementation, problem: Problem) -> int:
    """Bytes that forward and backward add, at their peak, to what is there with the inputs.

    On the CPU: resident set of a fresh process (memory_probe.py). On a GPU: the allocator's.

    Raises:
        MemoryError: the process was ended for lack of memory.
    """
    if problem.device == "cuda":
        inputs = make_inputs(problem, seed=0)
        evaluate(function, inputs)
        torch.cuda.empty_cache()
        return peak_bytes(inputs.features.device, lambda: evaluate(function, inputs))
    description = json.dumps(problem.to_dict())
    # glibc keeps freed blocks of up to 32 MiB for whoever asks next: what nobody holds is not to be counted.
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
