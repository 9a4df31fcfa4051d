"""Peak resident memory of one loss, in a process of its own: ``memory_probe.py IMPLEMENTATION PROBLEM``.

PROBLEM is the JSON of :class:`benchmarks.cases.Problem`. Prints one line of JSON. What is counted is the
growth of the resident set over the interpreter with torch and the inputs, through one forward and backward:
the gradient and an implementation's own workspace are in it. Libraries and the threads of torch are warmed
up by a small dense loss, not by the implementation itself, whose first call is the one that is measured
(torch.compile excepted: what its compiler takes is no part of the loss).
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Problem, make_inputs
from benchmarks.measure import evaluate
from benchmarks.peers import PEERS

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the highest so far)."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def forget_peak() -> bool:
    """Makes VmHWM start from what is resident now; False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class Sampler(threading.Thread):
    """The highest resident set, looked at every millisecond: for kernels that keep no mark to reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, resident("VmRSS"))

    def finish(self) -> int:
        self.done.set()
        self.join()
        return self.highest


def return_free_memory() -> None:
    """Gives freed blocks back to the system, so that they are not counted as there already."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def main(implementation: str, description: str) -> int:
    problem = Problem(**json.loads(description))
    small = Problem(n=256, dim=problem.dim, classes=8)
    evaluate(PEERS["dense"].build(small), make_inputs(small, seed=1))
    function = PEERS[implementation].build(problem)
    inputs = make_inputs(problem, seed=0)
    if implementation == "compiled":
        evaluate(function, inputs)
    return_free_memory()
    by_mark = forget_peak()
    before = resident("VmRSS")
    sampler = Sampler()
    if not by_mark:
        sampler.start()
    result = evaluate(function, inputs)
    peak = resident("VmHWM") if by_mark else sampler.finish()
    print(
        json.dumps(
            {
                "extra_bytes": max(peak - before, 0),
                "before_bytes": before,
                "loss": result.loss.item(),
                "method": "VmHWM" if by_mark else "samples of VmRSS",
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
