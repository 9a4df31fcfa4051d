"""Breaks the time of the CPU kernels down into products, work per pair and the rest.

    python benchmarks/kernels/breakdown.py [--n 8192] [--json FILE]

A pass over pairs takes T(D) = a + b D. The time of the products (1u forward, 3u backward) grows with the
width D of the rows; the time of the other work per pair (exponential, masks, weights, sums) does not. a and b
are fitted to widths with the same block size, which are timed in turns. The rest is the time of the loss
outside of the two operators.
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

import numpy as np
import torch

from benchmarks import machine, table
from pysupcon import functional
from pysupcon.pairs import ops

WIDTHS = (32, 64, 96, 128)
SHOWN = 128
CLASSES = 100
PRODUCTS = {"pair_stats": 1, "pair_stats_backward": 3}
"""Products of a pass, in units of N^2 D floating-point operations."""


def operators(n: int, width: int) -> dict[str, Callable[[], object]]:
    """The operators of SupCon's forward and backward, and the loss, on N unit rows."""
    generator = torch.Generator().manual_seed(width)
    x = torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
    labels = torch.arange(n) % CLASSES
    scale = torch.tensor(1 / 0.07, dtype=torch.float64)
    rows = (x, labels, torch.argsort(labels, stable=True), scale, *(None,) * 8)
    n_, p, *_ = ops.pair_stats(*rows, True, True)
    upstream = torch.full_like(p, 1 / n)
    grad = ops.zero_gradients(x)
    leaf = x.clone().requires_grad_()

    def loss() -> None:
        functional.supcon(leaf, labels, temperature=0.07).backward()
        leaf.grad = None

    return {
        "pair_stats": lambda: ops.pair_stats(*rows, True, True),
        "pair_stats_backward": lambda: ops.pair_stats_backward(
            *rows, n_, p, *(upstream,) * 3, *(None,) * 7, True, True, grad, None
        ),
        "loss": loss,
    }


def timed(n: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds by operator and width; all are timed in turns."""
    work = {width: operators(n, width) for width in WIDTHS}
    seconds: dict[str, dict[int, list[float]]] = {}
    for turn in range(rounds + 1):
        for width, calls in work.items():
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn:  # the first warms up
                    seconds.setdefault(name, {}).setdefault(width, []).append(time.perf_counter() - start)
    return {name: {w: statistics.median(t) for w, t in found.items()} for name, found in seconds.items()}


def breakdown(seconds: dict[str, dict[int, float]], n: int) -> dict[str, Any]:
    """The parts of one forward and backward at D = 128.

    Returns:
        "seconds" of each part and "loss_seconds" of the whole; "product_flops", the rate of the products in
        floating-point operations per second; "pair_seconds", the other work for one pair.
    """
    found: dict[str, Any] = {"seconds": {}, "product_flops": {}, "pair_seconds": {}}
    for name, units in PRODUCTS.items():
        widths = list(seconds[name])
        slope, fixed = np.polyfit(widths, [seconds[name][w] for w in widths], 1)
        found["seconds"][f"{name}: products"] = float(slope) * SHOWN
        found["seconds"][f"{name}: every pair"] = float(fixed)
        found["product_flops"][name] = units * n * n / float(slope)
        found["pair_seconds"][name] = 2 * float(fixed) / (n * n)
    passes = sum(seconds[name][SHOWN] for name in PRODUCTS)
    found["seconds"]["the rest of the loss"] = seconds["loss"][SHOWN] - passes
    found["loss_seconds"] = seconds["loss"][SHOWN]
    return found


def lines(found: dict[str, Any]) -> list[list[str]]:
    whole = found["loss_seconds"]
    return [
        ["part", "time", "share"],
        *([name, table.seconds(t), f"{100 * t / whole:.0f} %"] for name, t in found["seconds"].items()),
        ["forward and backward", table.seconds(whole), "100 %"],
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=8192, help="number of rows")
    parser.add_argument("--rounds", type=int, default=9, help="number of repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    about = machine.describe("cpu")
    found = breakdown(timed(options.n, options.rounds), options.n)
    print(f"{table.heading(about)}. SupCon, N={options.n}, D={SHOWN}.\n")
    print(table.align(lines(found)))
    for name, rate in found["product_flops"].items():
        pair = found["pair_seconds"][name]
        print(
            f"{name}: products at {rate / 1e9:.0f} GFLOP/s; {pair * 1e9:.2f} ns per pair for the other work"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {"machine": about, "n": options.n, **found}
        options.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
