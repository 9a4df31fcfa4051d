"""Runs one forward and backward of a loss on a GPU, for use under a profiler.

ncu ... python benchmarks/kernels/one_step.py --n 65536 --dim 128 --dtype bfloat16
python benchmarks/kernels/one_step.py --n 1024 --launches FILE   # counts kernel launches of every loss
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import fault_tolerance
from benchmarks.kernels.cases import DTYPES, LOSSES, Problem, make_inputs
from benchmarks.kernels.measure import evaluate
from benchmarks.kernels.peers import PEERS


def launches(problem: Problem) -> dict[str, Any]:
    """Kernels and copies of the second step by name; the first step also loads the kernels."""
    from torch.profiler import ProfilerActivity, profile

    function, inputs = PEERS["pysupcon"].build(problem), make_inputs(problem, seed=0)
    evaluate(function, inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        evaluate(function, inputs)
        torch.cuda.synchronize()
    on_device = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = Counter(event.name[:80] for event in on_device)
    return {**problem.to_dict(), "launches": sum(names.values()), "names": dict(names)}


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--n", type=int, nargs="+", default=[65_536], help="numbers of rows")
    options.add_argument("--dim", type=int, default=128)
    options.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    options.add_argument(
        "--launches",
        type=Path,
        metavar="FILE",
        help="count kernel launches of every loss, write them here",
    )
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 2
    problems = [Problem(n=n, dim=chosen.dim, dtype=chosen.dtype, device="cuda") for n in chosen.n]
    if chosen.launches is None:
        for problem in problems:
            evaluate(PEERS["pysupcon"].build(problem), make_inputs(problem, seed=0))
        torch.cuda.synchronize()
        return 0
    rows: list[dict[str, Any]] = []
    for problem in problems:
        for loss in LOSSES:
            rows.append(launches(Problem(**{**problem.to_dict(), "loss": loss})))
            print(f"{loss} N={problem.n}: {rows[-1]['launches']} launches per step", flush=True)
            fault_tolerance.write_json(chosen.launches, {"rows": rows})
    if not all(row["launches"] for row in rows):
        print("the profiler recorded no kernel: CUPTI is not usable on this machine", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
