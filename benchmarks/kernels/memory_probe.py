"""Measures the peak resident memory of one loss: ``memory_probe.py IMPLEMENTATION PROBLEM``.

PROBLEM is the JSON of :class:`benchmarks.kernels.cases.Problem`. Prints one line of JSON: the growth of the
resident set during one forward and backward, over a process that has loaded torch and the inputs. It includes
the gradient and the workspace of the implementation. A small dense loss loads libraries and starts torch's
threads first. The implementation itself is measured in its first call, except for torch.compile, so that the
memory of the compiler is not counted.
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
