"""Time of the CPU kernels with weights of candidates, and with the mean of the negatives for a memory.

    python benchmarks/kernels/weights.py [--n 16384] [--threads 2] [--json FILE]

Each row compares two ways with N unit rows of SupCon, in turns:

- weights: forward and backward with log weights of the candidates, relative to those without.
- memory: N anchors against N other rows without gradient. The forward that also computes the mean of the
  negatives and a backward over the positives only, relative to the forward and backward over all pairs of
  the same problem, and to the forward and backward of N rows among themselves.

Medians of wall-clock time, and processor time of the process, which depends less on other processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks import machine, table
from pysupcon.pairs import ops

CLASSES = 100
ROWS = [
    ("weights", "one set", "one set, weights"),
    ("memory, mean of the negatives", "memory, two passes", "memory, one pass"),
    ("memory beside the batch", "one set", "memory, one pass"),
]
"""(name, the way to compare with, way)"""


def ways(n: int, width: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of SupCon's operators."""
    generator = torch.Generator().manual_seed(0)
    x, memory = torch.nn.functional.normalize(torch.randn(2, n, width, generator=generator), dim=-1)
    labels, order = torch.arange(n) % CLASSES, torch.argsort(torch.arange(n) % CLASSES, stable=True)
    scale = torch.tensor(1 / 0.07, dtype=torch.float64)
    log_weights = torch.randn(n, generator=generator, dtype=torch.float64)
    upstream = torch.full((n,), 1 / n, dtype=torch.float64)
    one_set: tuple[Any, ...] = (x, labels, order, scale, *(None,) * 6)
    with_memory: tuple[Any, ...] = (x, labels, order, scale, memory, labels, order, *(None,) * 3)

    def both(rows: tuple[Any, ...], weights: Tensor | None = None, mean: bool = False) -> None:
        weighted = *rows, weights, None
        negative_mean = ops.zero_gradients(x) if mean else None
        n_, p, *_ = ops.pair_stats(*weighted, True, True, negative_mean)
        grad = ops.zero_gradients(x)
        ops.pair_stats_backward(*weighted, n_, p, *(upstream,) * 3, *(None,) * 7, not mean, True, grad, None)
        if negative_mean is not None:
            grad.addcmul_(negative_mean, (upstream * scale).float().unsqueeze(1))

    return {
        "one set": lambda: both(one_set),
        "one set, weights": lambda: both(one_set, log_weights),
        "memory, two passes": lambda: both(with_memory),
        "memory, one pass": lambda: both(with_memory, mean=True),
    }


def timed(n: int, width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and processor seconds of each way; all are timed in turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds + 1):
        for name, call in ways(n, width).items():
            start = time.perf_counter(), time.process_time()
            call()
            if turn:  # the first warms up
                seconds = found.setdefault(name, {"seconds": [], "processor": []})
                seconds["seconds"].append(time.perf_counter() - start[0])
                seconds["processor"].append(time.process_time() - start[1])
    return {name: {k: statistics.median(v) for k, v in kinds.items()} for name, kinds in found.items()}


def lines(found: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = [["", "time", "compared with", "ratio", "ratio of processor time"]]
    for name, base, way in ROWS:
        times, bases = found[way], found[base]
        ratios = [f"{times[kind] / bases[kind]:.3f}" for kind in ("seconds", "processor")]
        rows.append([name, table.seconds(times["seconds"]), table.seconds(bases["seconds"]), *ratios])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=16_384, help="number of rows")
    parser.add_argument("--dim", type=int, default=128, help="numbers per row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="number of repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = machine.describe("cpu")
    found = timed(options.n, options.dim, options.rounds)
    print(f"{table.heading(about)}. N={options.n}, D={options.dim}, float32, forward and backward.\n")
    print(table.align(lines(found)))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {"machine": about, "n": options.n, "dim": options.dim, "ways": found}
        options.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
