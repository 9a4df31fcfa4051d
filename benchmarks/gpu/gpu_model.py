"""Predicts the time of the pair kernels on a GPU, without a GPU, from the instructions of their tile loops.

    python benchmarks/gpu/gpu_model.py --card h100
    python benchmarks/gpu/gpu_model.py --card rtx4090 --compare ../before/csrc/cuda --json model.json

1. Compile csrc/cuda (or --kernels DIR) with nvcc for the card's architecture and disassemble it.
2. Follow the path through the tile loop of a tile whose columns all belong to other classes, the case of
   almost every tile (benchmarks/gpu/sass.py), and count its instructions.
3. Convert the counts to clocks of each pipe per tile on one multiprocessor.
4. Predict times, and print them with measured ones if benchmarks/results/ has a JSON of the card
   (benchmarks/kernels/run.py).

A path is valid if it has the tensor-core products that follow from the size of the tile, has one or two
exponentials per pair, and copies the columns of the tile. The program fails if there is no valid path. If a
kernel has valid paths with one and with two exponentials per pair, both are shown.

**All results are predictions.** The clocks of a tile are those of the largest pipe plus 10 to 22 % of the sum
of the other pipes among tensor, shared, issue and ex2, for the work that eight warps per multiprocessor
cannot overlap. This share is not measured: it was chosen so that the ranges agree, within 7 %, with a manual
estimate from the SASS of the first kernels on an H100 (forward 2,400 - 2,900 clocks per tile of 128 x 128,
backward 2,700 - 3,400 per tile of 128 x 64, D = 128). The pipes fp32, alu and l2 count only if one of them is
the largest. Time is the number of tiles of a multiprocessor * clocks of a tile / clock rate. The tiles are
those of whole row blocks, or equal shares if whole row blocks would leave multiprocessors idle. The model
ignores start-up, sorting, tiles with columns of the block's own class, the passes over positives, global
memory and bank conflicts.

Two counts are ranges. A load of 8 or 16 bytes per thread from shared memory takes one wavefront if lanes
share addresses, else two or four. Issue slots are between those of the shortest path and those of the path
that skips nothing (``sass_paths.without_skips``). "Copies not followed": no path has a copy in every step, so
the issue slots may belong to a path that is never executed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import table
from benchmarks.gpu.gpu_counts import Counts, count
from benchmarks.gpu.gpu_kernels import Kernel, ModelError, compile_kernels, demand

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
SHARE = (0.10, 0.22)
"""Share of the other pipes that does not overlap with the largest: low and high end of the prediction."""
WAVEFRONT = 128
"""Bytes that shared memory transfers per clock."""


class Card(NamedTuple):
    """A GPU. Rates are per clock and multiprocessor, from NVIDIA's data sheets unless noted."""

    arch: str
    pattern: str
    """regular expression for the device name in results of benchmarks/machine.py"""
    multiprocessors: int
    ghz: float
    """boost clock; H100 and H200: assumed clock under load"""
    multiply_adds: int
    """dense 16-bit products with fp32 accumulation by mma.sync"""
    fp32: int
    """lanes"""
    l2_bytes: int
    """second-level cache; assumed, from published microbenchmarks"""


#: On Hopper, mma.sync reaches 63.5 % of the rate of wgmma (2,048). GeForce has half the rate for fp32 sums.
CARDS = {
    "h100": Card("sm_90", r"H100(?!.*PCIe)|GH200", 132, 1.70, 1300, 128, 24),
    "h200": Card("sm_90", r"H200", 132, 1.70, 1300, 128, 24),
    "a100": Card("sm_80", r"A100", 108, 1.41, 1024, 64, 28),
    "a10": Card("sm_86", r"A10\b|A10G", 72, 1.69, 512, 128, 16),
    "rtx3090": Card("sm_86", r"RTX 3090(?! Ti)", 82, 1.70, 256, 128, 16),
    "l4": Card("sm_89", r"L4\b", 58, 2.04, 512, 128, 16),
    "l40s": Card("sm_89", r"L40S", 142, 2.52, 512, 128, 16),
    "rtx4090": Card("sm_89", r"RTX 4090(?! D)", 128, 2.52, 256, 128, 16),
    "rtx5090": Card("sm_120", r"RTX 5090(?! D)", 170, 2.41, 256, 128, 16),
}
ISSUE, EX2, ALU = 4, 16, 64
"""Warp instructions, special functions and integer operations per clock and multiprocessor of all cards."""

FORMATS = {"bf16": "bfloat16", "f16": "float16", "f32x2": None, "f32x3": "float32"}
"""Format -> dtype of measured rows. run.py measures float32 at the default precision, in three parts."""

Range = tuple[float, float]
OVERLAPPING = ("tensor", "shared", "issue", "ex2")


def pipes(counts: Counts, card: Card) -> dict[str, Range]:
    """Clocks of each pipe of a multiprocessor for one column tile, low and high."""
    number = Counter(counts.instructions)
    special = number["MUFU.EX2"] + number["MUFU other"]
    fp32 = (number["FP32"] + number["IMAD"]) * 32 / card.fp32
    alu = (number["integer"] + number["FMNMX, F2FP"]) * 32 / ALU
    found = {
        "tensor": counts.multiply_adds / card.multiply_adds,
        "shared": counts.wavefronts,
        "issue": (counts.issued[0] / ISSUE, counts.issued[1] / ISSUE),
        "ex2": special * 32 / EX2,
        "fp32": fp32,
        "alu": alu,
        "l2": counts.copied / card.l2_bytes,
    }
    return {name: value if isinstance(value, tuple) else (value, value) for name, value in found.items()}


def binding(clocks: Mapping[str, Range]) -> str:
    return max(clocks, key=lambda name: sum(clocks[name]))


def tile_clocks(clocks: Mapping[str, Range]) -> Range:
    """Largest pipe plus SHARE of the sum of the other OVERLAPPING pipes."""

    def end(at: int) -> float:
        largest = max(clocks, key=lambda name: clocks[name][at])
        others = sum(clocks[name][at] for name in OVERLAPPING if name != largest)
        return clocks[largest][at] + SHARE[at] * others

    return end(0), end(1)


def seconds(clocks: Range, kernel: Kernel, card: Card, n: int, dim: int) -> Range:
    """The tiles of N rows against themselves, divided as by share_out() in csrc/cuda/plan.h."""
    blocks, slots = kernel.config.BLOCKS, card.multiprocessors * kernel.config.BLOCKS
    if kernel.base == "forward_triangular":  # equal runs of the tiles on and above the diagonal
        row_blocks, columns = -(-n // kernel.config.BM), -(-n // kernel.config.BN)
        tiles = (row_blocks * columns - row_blocks * (row_blocks - 1)) / card.multiprocessors
        return tiles * clocks[0] / (card.ghz * 1e9), tiles * clocks[1] / (card.ghz * 1e9)
    row_blocks = -(-n // kernel.config.BM) * kernel.shares(dim)
    waves = -(-row_blocks // slots)
    idle = waves * slots * 16 > row_blocks * 17
    work = row_blocks / card.multiprocessors if idle else waves * blocks
    tiles = work * -(-n // kernel.config.BN)
    return tiles * clocks[0] / (card.ghz * 1e9), tiles * clocks[1] / (card.ghz * 1e9)


class Line(NamedTuple):
    """One kernel at one D on one card."""

    kernel: Kernel
    dim: int
    counts: Counts
    clocks: dict[str, Range]
    tile: Range
    times: dict[int, Range]
    """seconds by N"""


def model(kernels: Sequence[Kernel], card: Card, dims: Sequence[int], sizes: Sequence[int]) -> list[Line]:
    lines = []
    for dim in dims:
        for kernel in kernels:
            if not kernel.runs_at(dim):
                continue
            need = demand(kernel.base, kernel.config, dim)
            for counts in count(kernel.function, kernel.config.warps, need):
                clocks = pipes(counts, card)
                tile = tile_clocks(clocks)
                times = {n: seconds(tile, kernel, card, n, dim) for n in sizes}
                lines.append(Line(kernel, dim, counts, clocks, tile, times))
    return sorted(lines, key=lambda line: (line.dim, direction(line) != "forward"))


def direction(line: Line) -> str:
    return "forward" if line.kernel.base.startswith("forward") else "backward"


def totals(lines: Sequence[Line]) -> list[tuple[Line, int, Range]]:
    """(backward, N, seconds of forward plus backward) for each backward, with the fastest forward."""
    found = []
    for line in lines:
        if direction(line) == "backward":
            forwards = [f for f in lines if f.dim == line.dim and direction(f) == "forward"]
            for n, (low, high) in line.times.items():
                first = min(forward.times[n] for forward in forwards)
                found.append((line, n, (first[0] + low, first[1] + high)))
    return found


def measured(folder: Path, card: Card, dtype: str | None) -> dict[tuple[str, int, int], float]:
    """Measured seconds of SupCon by ("forward", "backward" or "both", D, N).

    Uses the results of benchmarks/kernels/run.py for the card and the dtype; the fastest, if there are
    several.
    """
    found: dict[tuple[str, int, int], float] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        about = results.get("machine", {}) if isinstance(results, dict) else {}
        if about.get("device") != "cuda" or not re.search(card.pattern, about.get("gpu", "")):
            continue
        for row in results["rows"]:
            known = (row["implementation"], row["loss"], row["dtype"])
            if known != ("pysupcon", "supcon", dtype) or "failed" in row:
                continue
            for way in ("forward", "backward", "both"):
                if f"{way}_s" in row:
                    key = (way, row["dim"], row["n"])
                    found[key] = min(found.get(key, math.inf), row[f"{way}_s"])
    return found


# ---- text


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Format template names as code, because Markdown interprets <...> as HTML."""
    code = [[re.sub(r"\w+<.*>", r"`\g<0>`", cell) for cell in line] for line in lines]
    return table.markdown(code)


def _range(value: Range) -> str:
    low, high = (f"{end:,.0f}" for end in value)
    return low if low == high else f"{low} - {high}"


def _span(value: Range) -> str:
    return f"{table.seconds(value[0])} - {table.seconds(value[1])}"


def _label(line: Line) -> str:
    unsure = "" if line.counts.even else ", copies not followed"
    return f"{line.kernel.name}, D={line.dim}, {line.counts.exponentials} exp{unsure}"


def _tile(line: Line) -> str:
    return f"{line.kernel.config.BM} x {line.kernel.config.BN}"


_COUNT_HEAD = "per column tile and block"


def clock_table(lines: Sequence[Line]) -> list[list[str]]:
    names = list(lines[0].clocks)
    head = ["kernel", "tile", *names, "binds", "expected", "registers/spilled/stack"]
    return [head] + [
        [
            _label(line),
            _tile(line),
            *(_range(line.clocks[name]) for name in names),
            binding(line.clocks),
            _range(line.tile),
            f"{line.kernel.registers}/{line.kernel.spilled}/{line.kernel.stack}",
        ]
        for line in lines
    ]


def time_table(lines: Sequence[Line], known: Mapping[tuple[str, int, int], float]) -> list[list[str]]:
    found = [(line, n, direction(line), span) for line in lines for n, span in line.times.items()]
    found += [(line, n, "both", span) for line, n, span in totals(lines)]
    found.sort(key=lambda row: (row[0].dim, row[1], ("forward", "backward", "both").index(row[2])))
    rows = [["D", "N", "pass", "kernel", "predicted", "measured"]]
    for line, n, way, span in found:
        name = f"{line.kernel.name}, {line.counts.exponentials} exp"
        there = table.seconds(known.get((way, line.dim, n)))
        if way == "both":
            name = f"with {name}"
        rows.append([str(line.dim), f"{n:,}", way, name, _span(span), there])
    return rows


def counterpart(line: Line, before: Sequence[Line]) -> Line | None:
    """The same kernel at the same D in other sources, with the same template arguments if possible."""
    alike = [old for old in before if (old.kernel.base, old.dim) == (line.kernel.base, line.dim)]
    return max(
        alike,
        key=lambda old: (
            old.kernel.name == line.kernel.name,
            old.counts.exponentials == line.counts.exponentials,
        ),
        default=None,
    )


def count_table(lines: Sequence[Line], before: Sequence[Line] = ()) -> list[list[str]]:
    """Warp instructions of a block for one column tile; with ``before``: before -> after."""
    columns = [(counterpart(line, before), line) for line in lines]

    def row(title: str, value: Callable[[Line], str]) -> list[str]:
        cells = [title]
        for old, new in columns:
            words = [value(line) for line in (old, new) if line is not None]
            same_name = title == _COUNT_HEAD and len(set(words)) == 1
            cells.append(words[-1] if same_name else " -> ".join(words))
        return cells

    def numbers(title: str, of: Callable[[Counts], float]) -> list[str]:
        return row(title, lambda line: f"{of(line.counts):,.0f}")

    def of_class(name: str) -> list[str]:
        return numbers(name, lambda counts: counts.instructions.get(name, 0))

    everything = [line for pair in columns for line in pair if line is not None]
    names = sorted({name for line in everything for name in line.counts.instructions})
    return [
        row(_COUNT_HEAD, _label),
        row("rows x columns of the tile", _tile),
        *map(of_class, names),
        numbers("issue slots, low", lambda c: c.issued[0]),
        numbers("issue slots, high", lambda c: c.issued[1]),
        numbers("shared wavefronts, low", lambda c: c.wavefronts[0]),
        numbers("shared wavefronts, high", lambda c: c.wavefronts[1]),
        numbers("bytes of cp.async", lambda c: c.copied),
        numbers("multiply-adds on tensor cores", lambda c: c.multiply_adds),
    ]


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": line.kernel.name,
            "dim": line.dim,
            "config": line.kernel.config._asdict(),
            "registers": line.kernel.registers,
            "spilled_bytes": line.kernel.spilled,
            "stack_bytes": line.kernel.stack,
            "counts": line.counts._asdict(),
            "clocks": line.clocks,
            "binds": binding(line.clocks),
            "tile_clocks": line.tile,
            "predicted_s": {str(n): span for n, span in line.times.items()},
        }
        for line in lines
    ]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--card", choices=list(CARDS), default="h100")
    found.add_argument("--arch", help="architecture, such as sm_90 (default: the card's)")
    found.add_argument(
        "--kernels", type=Path, default=ROOT / "csrc" / "cuda", metavar="DIR", help="folder of the sources"
    )
    found.add_argument("--compare", type=Path, metavar="DIR", help="folder of older sources to compare with")
    found.add_argument(
        "--format", choices=list(FORMATS), default="bf16", help="format of the rows (default %(default)s)"
    )
    found.add_argument("--dims", type=int, nargs="+", default=[128, 768], metavar="D")
    found.add_argument("--sizes", type=int, nargs="+", default=[65_536, 1_048_576], metavar="N")
    found.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
                       help="JSON files of benchmarks/kernels/run.py with measured times")  # fmt: skip
    found.add_argument(
        "--json", type=Path, metavar="FILE", help="write counts, clocks and times to this file"
    )
    found.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    card = CARDS[options.card]
    arch = options.arch or card.arch
    lines: dict[str, list[Line]] = {}
    try:
        for name, folder in (("before", options.compare), ("now", options.kernels)):
            if folder is not None:
                kernels = compile_kernels(folder.resolve(), arch, options.format)
                lines[name] = model(kernels, card, options.dims, options.sizes)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    known = measured(options.results, card, FORMATS[options.format])
    show = _markdown if options.markdown else table.align
    print(
        f"Predicted, not measured: {options.card} ({card.multiprocessors} multiprocessors, {card.ghz} GHz), "
        f"code for {arch}, {options.format}. Clocks of a multiprocessor for one column tile:"
    )
    for name, found in lines.items():
        head = f"\n{name}:\n" if len(lines) > 1 else ""
        print(f"{head}\n{show(clock_table(found))}\n\n{show(time_table(found, known))}")
    print(f"\n{show(count_table(lines['now'], lines.get('before', ())))}")
    if options.json is not None:
        about = {
            "schema": SCHEMA,
            "card": options.card,
            "arch": arch,
            "format": options.format,
            "predicted": True,
        }
        results = about | {"share": SHARE} | {name: to_json(found) for name, found in lines.items()}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
