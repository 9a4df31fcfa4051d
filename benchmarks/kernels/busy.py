"""Measures the losses while other processes use the processor.

    python benchmarks/kernels/busy.py [--threads 2] [--n N ...] [--seconds 1] [--json FILE]

Start it on an idle machine; it starts the busy processes itself. For each number of busy processes and each
N: median wall-clock time and processor time of SupCon's forward and backward with one thread and with
--threads, beside two torch.mm of the same work (4 N^2 D floating-point operations). A thread that waits for
another thread costs processor time. If the system does not run a thread, the others wait: that costs
wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import machine, table
from pysupcon import functional

SIZES = (256, 512, 1024, 2048, 4096, 8192)
BUSY = (0, 1, 2, 8)
DIM, CLASSES = 128, 100
SPIN = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` processes busy."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0.0)  # they have started
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def work_of(n: int) -> dict[str, Callable[[], object]]:
    """SupCon on N unit rows, and matrix products of the same work."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, DIM, generator=generator), dim=1)
    labels = torch.arange(n) % CLASSES
    leaf = x.clone().requires_grad_()
    square = torch.empty(n, n)

    def loss() -> None:
        functional.supcon(leaf, labels, temperature=0.07).backward()
        leaf.grad = None

    def products() -> None:
        torch.mm(x, x.T, out=square)
        torch.mm(square, x)

    return {"loss": loss, "torch.mm": products}


def timed(work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Medians of the wall-clock time and of the processor time, both in seconds."""
    work()
    wall, processor = [], []
    end = time.perf_counter() + seconds
    while len(wall) < 5 or (time.perf_counter() < end and len(wall) < 2000):
        start, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return statistics.median(wall), statistics.median(processor)


def measure(sizes: Sequence[int], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each number of busy processes, size, work and number of threads."""
    rows = []
    for count in BUSY:
        for n in sizes:
            work = work_of(n)
            with busy(count):
                for name, call in work.items():
                    for used in (1, threads):
                        torch.set_num_threads(used)
                        wall, processor = timed(call, seconds)
                        row = {"busy": count, "n": n, "work": name, "threads": used}
                        rows.append({**row, "seconds": wall, "processor_seconds": processor})
    return rows


def lines(rows: Sequence[dict[str, Any]], threads: int) -> list[list[str]]:
    """The table: one line for each number of busy processes and each N."""
    found = {(r["busy"], r["n"], r["work"], r["threads"]): r for r in rows}
    names = [
        f"{work}, {used}" for work in ("loss", "torch.mm") for used in ("1 thread", f"{threads} threads")
    ]
    ratios = [f"loss: time, {threads} : 1", f"loss: processor time, {threads} : 1"]
    result = [["busy processes", "N", *names, *ratios]]
    for count, n in dict.fromkeys((r["busy"], r["n"]) for r in rows):
        one, all_ = found[count, n, "loss", 1], found[count, n, "loss", threads]
        cells = [
            table.seconds(found[count, n, work, used]["seconds"])
            for work in ("loss", "torch.mm")
            for used in (1, threads)
        ]
        ratio = all_["seconds"] / one["seconds"]
        result.append(
            [
                str(count),
                str(n),
                *cells,
                f"{ratio:.2f}",
                f"{all_['processor_seconds'] / one['processor_seconds']:.2f}",
            ]
        )
    return result


def page_lines(rows: Sequence[dict[str, Any]], threads: int) -> list[str]:
    """The table of benchmarks/README.md: times with one thread and with all, and their ratio."""
    found = {(r["busy"], r["n"], r["threads"]): r["seconds"] for r in rows if r["work"] == "loss"}
    counts, sizes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("busy", "n"))
    heads = [
        f"{count} busy process{'es' if count > 1 else ''}" if count else "idle machine" for count in counts
    ]
    result = [["N", *heads], ["---"] * (1 + len(counts))]
    for n in sizes:
        cells = []
        for count in counts:
            one, all_ = found[count, n, 1], found[count, n, threads]
            cells.append(f"{table.seconds(one)}, {table.seconds(all_)} ({all_ / one:.2f})")
        result.append([f"{n:,}", *cells])
    return [f"| {' | '.join(line)} |" for line in result]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=max(2, torch.get_num_threads()),
        help="number of threads to compare with one thread, at least 2 (default: %(default)s)",
    )
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="time of one measurement (default: %(default)s). On a busy machine the first losses are slow, "
        "until the kernels use one thread: with less than a second the median may be one of these",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    if options.threads < 2:
        parser.error(f"--threads must be at least 2: it is compared with one thread; got {options.threads}")
    torch.set_num_threads(options.threads)
    about = machine.describe("cpu")
    rows = measure(options.n, options.threads, options.seconds)
    print(f"{table.heading(about)}. SupCon forward and backward, D={DIM}, {CLASSES} classes.\n")
    print(table.align(lines(rows, options.threads)))
    print("\nFor benchmarks/README.md:\n", *page_lines(rows, options.threads), sep="\n")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
