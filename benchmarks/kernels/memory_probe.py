"""Peak resident memory of one loss, in a process of its own: ``memory_probe.py IMPLEMENTATION PROBLEM``.

PROBLEM is the JSON of :class:`benchmarks.kernels.cases.Problem`. Prints one line of JSON. What is counted is
the growth of the resident set over the interpreter with torch and the inputs, through one forward and
backward: the gradient and an implementation's own workspace are in it. Libraries and the threads of torch are
warmed up by a small dense loss, not by the implementation itself, whose first call is the one that is
measured (torch.compile excepted: what its compiler takes is no part of the loss).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.cases import Problem, make_inputs
from benchmarks.kernels.measure import evaluate
from benchmarks.kernels.peers import PEERS
from pysupcon.profiling.memory import peak_bytes


def main(implementation: str, description: str) -> int:
    problem = Problem(**json.loads(description))
    small = Problem(n=256, dim=problem.dim, classes=8)
    evaluate(PEERS["dense"].build(small), make_inputs(small, seed=1))
    function = PEERS[implementation].build(problem)
    inputs = make_inputs(problem, seed=0)
    if implementation == "compiled":
        evaluate(function, inputs)
    extra = peak_bytes(inputs.features.device, lambda: evaluate(function, inputs))
    print(json.dumps({"extra_bytes": extra}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
