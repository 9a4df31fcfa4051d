"""Predicts, without a GPU, how long the pair kernels take on one: counts what their tile loops issue.

    python benchmarks/gpu_model.py --card h100
    python benchmarks/gpu_model.py --card rtx4090 --compare ../before/csrc/cuda --json model.json

1. compiles csrc/cuda (or --kernels DIR) with nvcc for the card's architecture and disassembles it
2. follows the path of a tile whose columns all belong to other classes, which almost every tile is, through
   the tile loop (benchmarks/sass.py), and counts instructions
3. converts them to clocks of each pipe for a tile on one multiprocessor
4. predicts times, beside measured ones where benchmarks/results/ has a JSON of the card (benchmarks/run.py)

A path counts only if its products on tensor cores are those that the tile's size demands, it has one or two
exponentials a pair and copies the tile's columns; if there is none, the program fails. Where a kernel has paths of
one and of two exponentials a pair, both are shown.

**Everything here is a prediction.** The formula for a tile: the largest pipe plus a share, 10 to 22 %, of the sum of
the other pipes among tensor, shared, issue and ex2, because eight warps a multiprocessor do not hide all of one
pipe's work behind another's. The share is not measured: it was chosen so that the range agrees, within 7 %, with an
estimate made by hand from the same kernels' SASS. A multiprocessor finishes whole blocks: the time is
ceil(blocks / multiprocessors) * tiles * clocks of a tile / clock rate. Start-up, sorting, tiles of more than one class
and global memory are left out. Shared memory has a range: a load of 8 or 16 bytes a thread takes one wavefront where
lanes share addresses, else two or four. So do issue slots: see ``sass.without_skips``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import sass, table

SCHEMA = 1
SHARE = (0.10, 0.22)
"""of the other pipes that is not hidden behind the largest: low and high end of the prediction"""
WAVEFRONT = 128
"""bytes that shared memory serves in a clock"""


class Card(NamedTuple):
    """A GPU. Rates are per clock and multiprocessor, from NVIDIA's data sheets where not said otherwise."""

    arch: str
    pattern: str
    """regular expression for the device's name, as benchmarks/machine.py stores it"""
    multiprocessors: int
    ghz: float
    """boost clock; H100 and H200: assumed clock under load"""
    multiply_adds: int
    """dense 16-bit products with fp32 accumulation by mma.sync"""
    fp32: int
    """lanes"""
    l2_bytes: int
    """second-level cache; assumed, from published microbenchmarks"""


#: mma.sync reaches 63.5 % of what wgmma does (2,048) on Hopper; GeForce halves the rate of fp32 accumulation.
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
"""warp instructions, special functions, integer operations per clock and multiprocessor, every card"""

FORMATS = {"bf16": "bfloat16", "f16": "float16", "f32x2": "float32", "f32x3": "float32"}
#: what shared memory a block of each kernel takes, in terms of its configuration C and the row's chunks
KERNELS = {
    "pair_forward": "forward_shared_bytes<C>(chunks)",
    "backward_resident": "sizeof(ResidentShared<C>)",
    "backward_streamed": "sizeof(StreamedShared<C>)",
}


class ModelError(RuntimeError):
    """The model cannot say anything: a tool is missing, or the code is not what it expects."""


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel, as the compiler knows them."""

    BM: int
    BN: int
    CH: int
    PARTS: int
    THREADS: int
    RESIDENT: int
    OUT: int
    """slices of gradient that a block of backward_streamed makes; 0: all"""

    @property
    def warps(self) -> int:
        return self.THREADS // 32

    def slices(self, dim: int) -> int:
        return -(-dim // (8 * self.CH))


@dataclass(frozen=True)
class Kernel:
    name: str
    base: str
    """key of KERNELS"""
    config: Config
    function: sass.Function
    registers: int
    spilled: int
    stack: int

    def runs_at(self, dim: int) -> bool:
        if self.base == "pair_forward" or self.config.PARTS > 1:
            return True
        return (self.base == "backward_resident") == (self.config.slices(dim) <= self.config.RESIDENT)

    def shares(self, dim: int) -> int:
        """Blocks that share the gradient of the same rows."""
        return -(-self.config.slices(dim) // self.config.OUT) if self.base == "backward_streamed" else 1


class Demand(NamedTuple):
    """What the arithmetic demands of one warp for one column tile."""

    multiply_adds: int
    pairs: int
    """of one lane: exponentials, one for each"""
    copied: int
    """bytes"""
    step: int
    """least bytes copied between two barriers"""
    trips: int


def demand(base: str, c: Config, dim: int) -> Demand:
    slices = c.slices(dim)
    products = c.PARTS * (c.PARTS + 1) // 2
    row = 16 * c.CH * c.PARTS  # bytes of a row's slice
    streamed_rows = base == "backward_streamed" or (base == "pair_forward" and slices > c.RESIDENT)
    gradient = 0 if base == "pair_forward" else slices if base == "backward_resident" else min(c.OUT, slices)
    copied = slices * row * (c.BN + (c.BM if streamed_rows else 0))
    if base == "backward_streamed":
        copied += gradient * row * c.BN
        step = row * c.BN
    else:
        step = copied // slices if base == "pair_forward" else copied
    multiply_adds = products * c.BM * c.BN * 8 * c.CH * (slices + gradient)
    return Demand(
        multiply_adds // c.warps, c.BM * c.BN // c.THREADS, copied // c.warps, step // c.warps, slices
    )


# ---- compiling


def find_tool(name: str, beside: str | None = None) -> str | None:
    """A CUDA program: on PATH, beside nvcc, in CUDA_HOME, /usr/local/cuda or the installed package triton."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    if beside:
        folders.insert(0, Path(beside).resolve().parent)
    triton = util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(place) / "backends" / "nvidia" / "bin")
    found = [shutil.which(name), *(str(folder / name) for folder in folders)]
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


def tools() -> tuple[str, list[str]]:
    """(nvcc, the disassembler's command).

    Raises:
        ModelError: one of them is missing.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise ModelError("nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
    for name, flag in (("nvdisasm", "-c"), ("cuobjdump", "-sass")):
        path = find_tool(name, nvcc)
        if path is not None:
            return nvcc, [path, flag]
    raise ModelError(
        "neither nvdisasm nor cuobjdump was found on PATH, beside nvcc, in CUDA_HOME, in /usr/local/cuda or in the "
        "Python package triton, which carries both"
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


_RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


def compile_kernels(
    folder: Path, arch: str, number_format: str = "bf16", only: str = "", defines: Sequence[str] = ()
) -> list[Kernel]:
    """The hot kernels of one number format in ``folder``.

    Args:
        folder: with the .cu files.
        only: part of the file names that are compiled ("forward"); "": all of the format.
    """
    nvcc, disassembler = tools()
    sources = sorted(p for p in folder.glob(f"*{number_format}*.cu") if only in p.name)
    if not sources:
        raise ModelError(f"{folder} has no *{only}*{number_format}*.cu")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{folder.parent}", f"-I{folder}", *defines]
    with tempfile.TemporaryDirectory() as directory:
        log, parsed = "", []
        for source in sources:
            cubin = f"{directory}/{source.stem}.cubin"
            log += _run(nvcc, *flags, f"-arch={arch}", "-Xptxas=-v", "-cubin", str(source), "-o", cubin)
            parsed += sass.parse(_run(*disassembler, cubin))
        functions = {f.name: f for f in parsed if any(base in f.name for base in KERNELS)}
        readable = dict(zip(functions, demangle(list(functions)), strict=True))
        resources = {m["name"]: m for m in _RESOURCES.finditer(log)}
        hot = {name: split_name(readable[name]) for name in functions}
        hot = {name: parts for name, parts in hot.items() if parts[1][1].startswith("Statistics")}
        configs = _configs(
            {(base, arguments[0]) for base, arguments in hot.values()}, nvcc, flags, Path(directory)
        )
    return [
        Kernel(
            short_name(base, arguments),
            base,
            configs[base, arguments[0]],
            functions[name],
            int(resources[name]["registers"]),
            int(resources[name]["stores"]) + int(resources[name]["loads"]),
            int(resources[name]["stack"]),
        )
        for name, (base, arguments) in hot.items()
    ]


def demangle(names: list[str]) -> list[str]:
    if not names:
        return []
    tool = find_tool("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise ModelError("c++filt was not found; it comes with g++ (binutils)")
    return _run(tool, *names).splitlines()


def split_name(readable: str) -> tuple[str, list[str]]:
    """'void a::backward_resident<a::C<gpu::Bf16, 1>, a::W>(...)' -> ("backward_resident", ["C<gpu::Bf16, 1>", "W"])."""
    base = next(base for base in KERNELS if base in readable)
    arguments, depth = [""], 0
    for character in readable[readable.index(base) + len(base) + 1 :]:
        depth += (character == "<") - (character == ">")
        if depth < 0:
            break
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return base, [argument.strip().replace("pysupcon::cuda::", "") for argument in arguments]


def short_name(base: str, arguments: Sequence[str]) -> str:
    config = re.sub(r"^\w+<(.*)>$", r"\1", arguments[0]).replace("gpu::", "")
    return f"{base}<{', '.join([config, *arguments[1:]])}>"


def _configs(
    wanted: set[tuple[str, str]], nvcc: str, flags: Sequence[str], directory: Path
) -> dict[tuple[str, str], Config]:
    """Compiles and runs a host program that prints the configurations' constants."""
    lines = []
    for base, config in sorted(wanted):
        optional = "C::OUT" if base == "backward_streamed" else "0"
        values = ["C::BM", "C::BN", "C::CH", "C::PARTS", "C::THREADS", "C::RESIDENT", optional]
        format_, casts = " ".join(["%d"] * len(values)), ", ".join(f"int({v})" for v in values)
        lines.append(f'{{ using C = {config}; printf("{base}|{config}|{format_}\\n", {casts}); }}')
    source, program = directory / "config.cu", directory / "config"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "backward.cuh"\n#include "forward.cuh"\n'
        "using namespace pysupcon::cuda;\nint main() {\n" + "\n".join(lines) + "\n}\n"
    )
    _run(nvcc, *flags, str(source), "-o", str(program))
    found = {}
    for line in _run(str(program)).splitlines():
        base, config, numbers = line.split("|")
        found[base, config] = Config(*map(int, numbers.split()))
    return found


# ---- counting


class Counts(NamedTuple):
    """What one iteration of a tile loop issues for one column tile: warp instructions of the whole block."""

    instructions: dict[str, float]
    """by class, see classify()"""
    issued: tuple[float, float]
    """all of them, low and high"""
    multiply_adds: float
    wavefronts: tuple[float, float]
    """of shared memory, low and high"""
    copied: float
    """bytes from global to shared memory"""
    exponentials: int
    """a pair"""


_FP32 = (
    "FFMA",
    "FADD",
    "FMUL",
    "FFMA2",
    "FADD2",
    "FMUL2",
    "HFMA2",
    "HADD2",
    "HMUL2",
    "FFMA32I",
    "FMUL32I",
    "FADD32I",
)
_COMPARE = ("FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "FCHK", "F2FP", "F2F", "FSWZADD")
_CONTROL = ("BRA", "BSSY", "BSYNC", "BREAK", "BAR", "DEPBAR", "LDGDEPBAR", "EXIT", "NOP", "WARPSYNC", "CALL", "RET",
            "YIELD", "JMP", "LDGDEPBAR", "ERRBAR", "MEMBAR", "WARPSYNC")  # fmt: skip
_GLOBAL = (
    "LDG",
    "STG",
    "LD",
    "ST",
    "LDC",
    "LDCU",
    "ATOM",
    "ATOMG",
    "RED",
    "LDL",
    "STL",
    "S2R",
    "S2UR",
    "CS2UR",
    "SHFL",
)


def classify(instruction: sass.Instruction) -> str:
    name = instruction.name
    if instruction.guard == "!PT" or name in _CONTROL:  # never executed: ptxas puts "@!PT LDS" before LDGSTS
        return "control"
    if name == "MUFU":
        return "MUFU.EX2" if instruction.opcode.startswith("MUFU.EX2") else "MUFU other"
    if name in ("LDS", "STS"):
        return f"{name}.{8 * sass.width(instruction.opcode)}"
    if name in ("HMMA", "LDSM", "LDGSTS", "IMAD"):
        return name
    if name in _FP32:
        return "FP32"
    if name in _COMPARE:
        return "FMNMX, F2FP"
    if name in _GLOBAL:
        return "global, constant"
    if name.startswith("U") or name in ("R2UR", "VOTEU"):
        return "uniform"
    if re.match(r"I|LOP|SHF|LEA|SEL|PRMT|MOV|PLOP|VI|P2R|R2P|BMSK|SGXT|CS2R|LOP3|POPC|FLO|VOTE", name):
        return "integer"
    return "other"


def wavefronts(instruction: sass.Instruction) -> tuple[int, int]:
    """Clocks of shared memory that one warp instruction takes, at least and at most, without bank conflicts."""
    if instruction.guard == "!PT":
        return 0, 0
    words = sass.width(instruction.opcode) // 4
    if instruction.name == "LDSM":
        matrices = int(instruction.opcode.rpartition(".")[2]) if instruction.opcode[-1] in "24" else 1
        return matrices, matrices
    if instruction.name == "LDS":
        return 1, words
    return (words, words) if instruction.name in ("STS", "LDGSTS") else (0, 0)


def tile_loops(graph: sass.Graph) -> list[sass.Loop]:
    """The innermost loops that hold products on tensor cores and exponentials."""

    def holds_both(loop: sass.Loop) -> bool:
        work = sass.work_of(i for block in loop.blocks for i in graph.blocks[block])
        return work is not None and work.multiply_adds > 0 and work.exponentials > 0

    every = [loop for top in sass.loops(graph) for loop in top.walk()]
    return [loop for loop in every if holds_both(loop) and not any(map(holds_both, loop.children))]


def count(function: sass.Function, warps: int, need: Demand) -> list[Counts]:
    """Counts of each path through the tile loop that does what ``need`` says, by exponentials a pair.

    Raises:
        ModelError: there is none: this is not the loop, or not the size, that was expected.
    """
    graph = sass.control_flow(function)
    longer = sass.without_skips(graph)
    seen: list[str] = []
    for tiles in (1, 2, 4):  # nvcc may unroll the loop
        found: dict[int, Counts] = {}
        for loop in tile_loops(graph):
            low = _cheapest(graph, loop, need, tiles, seen)
            for exponentials, path in low.items():
                high = _cheapest(longer, loop, need, tiles, seen).get(exponentials, path)
                counts = _tally(graph, path, high.issued, warps, tiles, exponentials)
                if exponentials not in found or counts.issued < found[exponentials].issued:
                    found[exponentials] = counts
        if found:
            return [found[key] for key in sorted(found)]
    listed = "; ".join(dict.fromkeys(seen)) or "no loop with products on tensor cores and exponentials"
    raise ModelError(
        f"{function.name}: no path through a tile loop does what a warp must for one column tile, "
        f"{need.multiply_adds} multiply-adds, {need.pairs} exponentials a lane or twice as many, {need.copied} bytes "
        f"copied, at least {need.step} between barriers. Found: {listed}"
    )


def _cheapest(
    graph: sass.Graph, loop: sass.Loop, need: Demand, tiles: int, seen: list[str]
) -> dict[int, sass.Path]:
    limit = sass.Limit(
        tiles * need.multiply_adds, 3 * tiles * need.pairs - 1, tiles * need.copied, need.step, need.trips
    )
    found: dict[int, sass.Path] = {}
    for work, path in sass.loop_paths(graph, loop, limit).items():
        seen.append(f"{work.multiply_adds}, {work.exponentials}, {work.copied}")
        exponentials = work.exponentials // (tiles * need.pairs)
        if work.multiply_adds == limit.multiply_adds and work.copied == limit.copied and exponentials > 0:
            if exponentials not in found or path.issued < found[exponentials].issued:
                found[exponentials] = path
    return found


def _tally(
    graph: sass.Graph, path: sass.Path, most_issued: int, warps: int, tiles: int, exponentials: int
) -> Counts:
    scale = warps / tiles
    instructions: Counter[str] = Counter()
    products = low = high = copied = 0
    for block, times in path.times.items():
        for instruction in graph.blocks[block]:
            instructions[classify(instruction)] += times
            products += times * sass.multiply_adds(instruction.opcode)
            copied += times * sass.copied_bytes(instruction.opcode)
            least, most = wavefronts(instruction)
            low, high = low + times * least, high + times * most
    return Counts(
        {name: scale * number for name, number in sorted(instructions.items())},
        (scale * path.issued, scale * max(most_issued, path.issued)),
        scale * products,
        (scale * low, scale * high),
        scale * copied,
        exponentials,
    )


# ---- the model

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
    """Of N rows against themselves."""
    blocks = -(-n // kernel.config.BM) * kernel.shares(dim)
    tiles = math.ceil(blocks / card.multiprocessors) * -(-n // kernel.config.BN)
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
    return sorted(lines, key=lambda line: (line.dim, line.kernel.base != "pair_forward"))


def direction(line: Line) -> str:
    return "forward" if line.kernel.base == "pair_forward" else "backward"


def totals(lines: Sequence[Line]) -> dict[tuple[int, int], Range]:
    """Forward plus backward by (D, N), each by its fastest kernel."""
    found: dict[tuple[int, int], Range] = {}
    for dim, n in {(line.dim, n): None for line in lines for n in line.times}:
        best = [
            min((line.times[n] for line in lines if line.dim == dim and direction(line) == way), default=None)
            for way in ("forward", "backward")
        ]
        if best[0] and best[1]:
            found[dim, n] = (best[0][0] + best[1][0], best[0][1] + best[1][1])
    return found


def measured(folder: Path, card: Card, dtype: str) -> dict[tuple[str, int, int], float]:
    """Seconds by ("forward", "backward" or "both", D, N) of SupCon in the results of benchmarks/run.py that were
    measured on the card; where several have a point, the fastest."""
    found: dict[tuple[str, int, int], float] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        about = results.get("machine", {}) if isinstance(results, dict) else {}
        if about.get("device") != "cuda" or not re.search(card.pattern, about.get("gpu", "")):
            continue
        for row in results["rows"]:
            if (row.get("implementation"), row.get("loss"), row.get("dtype")) != (
                "pysupcon",
                "supcon",
                dtype,
            ):
                continue
            for way in ("forward", "backward", "both"):
                if f"{way}_s" in row:
                    key = (way, row["dim"], row["n"])
                    found[key] = min(found.get(key, math.inf), row[f"{way}_s"])
    return found


# ---- text


def _range(value: Range, digits: int = 0) -> str:
    low, high = (f"{end:,.{digits}f}" for end in value)
    return low if low == high else f"{low} - {high}"


def _span(value: Range) -> str:
    return f"{table.seconds(value[0])} - {table.seconds(value[1])}"


def _label(line: Line) -> str:
    return f"{line.kernel.name}, D={line.dim}, {line.counts.exponentials} exp"


def clock_table(lines: Sequence[Line]) -> list[list[str]]:
    names = list(lines[0].clocks)
    head = ["kernel", "tile", *names, "binds", "expected", "registers/spilled/stack"]
    return [head] + [
        [
            _label(line),
            f"{line.kernel.config.BM} x {line.kernel.config.BN}",
            *(_range(line.clocks[name]) for name in names),
            binding(line.clocks),
            _range(line.tile),
            f"{line.kernel.registers}/{line.kernel.spilled}/{line.kernel.stack}",
        ]
        for line in lines
    ]


def time_table(lines: Sequence[Line], known: Mapping[tuple[str, int, int], float]) -> list[list[str]]:
    rows = [["D", "N", "pass", "kernel", "predicted", "measured"]]
    for line in lines:
        for n, span in line.times.items():
            name = f"{line.kernel.name}, {line.counts.exponentials} exp"
            there = table.seconds(known.get((direction(line), line.dim, n)))
            rows.append([str(line.dim), f"{n:,}", direction(line), name, _span(span), there])
    for (dim, n), span in totals(lines).items():
        there = table.seconds(known.get(("both", dim, n)))
        rows.append([str(dim), f"{n:,}", "both", "the fastest of each", _span(span), there])
    order = {"forward": 0, "backward": 1, "both": 2}
    return [rows[0], *sorted(rows[1:], key=lambda r: (int(r[0]), int(r[1].replace(",", "")), order[r[2]]))]


def count_table(lines: Sequence[Line], before: Sequence[Line] = ()) -> list[list[str]]:
    """Warp instructions of a block for one column tile; with ``before``: before -> after."""
    columns = {_label(line): line.counts for line in lines}
    older = {_label(line): line.counts for line in before}
    labels = list(dict.fromkeys([*older, *columns]))

    def cell(label: str, value: Any) -> str:
        old, new = (f"{value(c[label]):,.0f}" if label in c else "-" for c in (older, columns))
        return f"{old} -> {new}" if before else new

    rows = [["per column tile and block", *labels]]
    names = sorted({name for c in (*columns.values(), *older.values()) for name in c.instructions})
    for name in names:
        rows.append([name, *(cell(label, lambda c, k=name: c.instructions.get(k, 0)) for label in labels)])
    for title, value in (
        ("issue slots, low", lambda c: c.issued[0]),
        ("issue slots, high", lambda c: c.issued[1]),
        ("shared wavefronts, low", lambda c: c.wavefronts[0]),
        ("shared wavefronts, high", lambda c: c.wavefronts[1]),
        ("bytes of cp.async", lambda c: c.copied),
        ("multiply-adds on tensor cores", lambda c: c.multiply_adds),
    ):
        rows.append([title, *(cell(label, value) for label in labels)])
    return rows


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": line.kernel.name,
            "dim": line.dim,
            "config": asdict(line.kernel.config),
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
    found.add_argument("--arch", help="compile for this one, sm_90 (default: the card's)")
    found.add_argument(
        "--kernels", type=Path, default=ROOT / "csrc" / "cuda", metavar="DIR", help="the sources"
    )
    found.add_argument("--compare", type=Path, metavar="DIR", help="sources of before, counted beside them")
    found.add_argument(
        "--format", choices=list(FORMATS), default="bf16", help="of the rows (default %(default)s)"
    )
    found.add_argument("--dims", type=int, nargs="+", default=[128, 768], metavar="D")
    found.add_argument("--sizes", type=int, nargs="+", default=[65_536, 1_048_576], metavar="N")
    found.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
                       help="JSON files of benchmarks/run.py to look for measured times in")  # fmt: skip
    found.add_argument("--json", type=Path, metavar="FILE", help="write counts, clocks and times there")
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
    show = table.markdown if options.markdown else table.align
    print(
        f"Predicted, not measured: {options.card} ({card.multiprocessors} multiprocessors, {card.ghz} GHz), code for "
        f"{arch}, {options.format}. Clocks of a multiprocessor for one column tile:"
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
