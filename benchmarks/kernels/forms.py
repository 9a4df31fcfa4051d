"""Time and memory of the forms of contrast: memory, weights, several labels, hard negatives.

    python benchmarks/kernels/forms.py [--n 16384] [--threads 2] [--rounds 7] [--json FILE]

Forward and backward of SupCon with N unit rows of width D in 100 classes. Each form is timed in turns with
SupCon without it. Memory is the peak that torch allocates during forward and backward, without the inputs.
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
from torch.nn.functional import normalize

from benchmarks import machine, table
from pysupcon import functional
from pysupcon.profiling.recorder import allocated_peak

CLASSES, LABELS, LABELS_PER_ROW, HARD = 100, 20, 3, 5
PLAIN = "SupCon"


def forms(n: int, dim: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (labels, further arguments of the loss)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    chosen = torch.rand(n, LABELS, generator=generator).argsort(dim=1)[:, :LABELS_PER_ROW]
    many = torch.zeros(n, LABELS, dtype=torch.bool).scatter_(1, chosen, True)
    memory = normalize(torch.randn(n, dim, generator=generator), dim=1)
    hard = normalize(torch.randn(n, HARD, dim, generator=generator), dim=2)
    weights = torch.rand(n, generator=generator) + 0.5
    return {
        PLAIN: (labels, {}),
        f"memory of {n:,} rows": (labels, {"memory": memory, "memory_labels": labels}),
        "candidate_weights": (labels, {"candidate_weights": weights}),
        "class_balance": (labels, {"class_balance": True}),
        "ignore_index, a tenth of the rows": (torch.where(labels < 10, -1, labels), {"ignore_index": -1}),
        f"hard_negatives, {HARD} a row": (labels, {"hard_negatives": hard}),
        f"{LABELS} labels, per_label": (many, {}),
        f"{LABELS} labels, any": (many, {"multi_label": "any"}),
        f"{LABELS} labels, jaccard": (many, {"multi_label": "jaccard"}),
    }


def step(n: int, dim: int, labels: Any, options: dict[str, Any]) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)
    x = normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_()

    def run() -> None:
        x.grad = None
        functional.supcon(x, labels, temperature=0.07, **options).backward()

    return run


def measure(n: int, dim: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each form and of SupCon before it, the median of their ratios, and bytes."""
    every = forms(n, dim)
    plain = step(n, dim, *every[PLAIN])
    found = {}
    for name, arguments in every.items():
        run = step(n, dim, *arguments)
        times: list[tuple[float, float]] = []
        for turn in range(rounds + 1):
            seconds = []
            for call in (plain, run):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            if turn:  # the first warms up
                times.append((seconds[0], seconds[1]))
        found[name] = {
            "seconds": statistics.median(own for _, own in times),
            "ratio": statistics.median(own / base for base, own in times),
            "bytes": allocated_peak(torch.device("cpu"), run),
        }
    return found


def lines(found: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = [["form", "time", "relative to SupCon", "memory"]]
    for name, one in found.items():
        memory = f"{one['bytes'] / 2**20:.1f} MiB"
        rows.append([name, table.seconds(one["seconds"]), f"{one['ratio']:.2f}", memory])
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
    found = measure(options.n, options.dim, options.rounds)
    print(f"{table.heading(about)}. N={options.n}, D={options.dim}, float32, forward and backward.\n")
    print(table.align(lines(found)))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {"machine": about, "n": options.n, "dim": options.dim, "forms": found}
        options.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
