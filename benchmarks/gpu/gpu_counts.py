"""Counts the instructions of a kernel's tile loop for one column tile."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from benchmarks.gpu import sass, sass_paths
from benchmarks.gpu.gpu_kernels import Demand, ModelError


class Counts(NamedTuple):
    """Warp instructions of a whole block for one column tile."""

    instructions: dict[str, float]
    """number by class, see classify()"""
    issued: tuple[float, float]
    """number of all instructions, low and high"""
    multiply_adds: float
    wavefronts: tuple[float, float]
    """wavefronts of shared memory, low and high"""
    copied: float
    """bytes copied from global to shared memory"""
    exponentials: int
    """exponentials per pair"""
    even: bool
    """whether the path has a copy in every step, see Limit.step"""


CLASSES = {
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BAR DEPBAR LDGDEPBAR NOP WARPSYNC YIELD "
    "ERRBAR MEMBAR",
    "FP32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2",
    "FMNMX, F2FP": "FMNMX FMNMX3 FSETP FSEL FSET FCHK F2FP F2F",
    "global, constant": "LDG STG LD ST LDC LDCU ATOM ATOMG RED S2R S2UR SHFL",
    "local": "LDL STL",
    "uniform": "R2UR",
    "integer": "IADD IADD3 IABS IMNMX ISETP LOP LOP3 PLOP3 SHF LEA SEL PRMT MOV VIADD VIADDMNMX VIMNMX VOTE "
    "P2R R2P BMSK SGXT CS2R POPC FLO I2F F2I I2FP",
}
"""Class -> opcodes. Other opcodes are classes of their own, or belong to "uniform" or "other"."""
_CLASS_OF = {name: group for group, names in CLASSES.items() for name in names.split()}


def classify(instruction: sass.Instruction) -> str:
    name = instruction.name
    if instruction.guard == "!PT":  # never executed: ptxas puts "@!PT LDS" before LDGSTS
        return "control"
    if name == "MUFU":
        return "MUFU.EX2" if instruction.opcode.startswith("MUFU.EX2") else "MUFU other"
    if name in ("LDS", "STS"):
        return f"{name}.{8 * sass_paths.width(instruction.opcode)}"
    if name in ("HMMA", "LDSM", "LDGSTS", "IMAD"):
        return name
    return _CLASS_OF.get(name, "uniform" if name.startswith("U") else "other")


def wavefronts(instruction: sass.Instruction) -> tuple[int, int]:
    """Clocks of shared memory per warp instruction without bank conflicts: (minimum, maximum)."""
    if instruction.guard == "!PT":
        return 0, 0
    words = sass_paths.width(instruction.opcode) // 4
    if instruction.name == "LDSM":
        matrices = int(instruction.opcode.rpartition(".")[2]) if instruction.opcode[-1] in "24" else 1
        return matrices, matrices
    if instruction.name == "LDS":
        return 1, words
    return (words, words) if instruction.name in ("STS", "LDGSTS") else (0, 0)


def tile_loops(graph: sass.Graph) -> list[sass.Loop]:
    """The loops that contain tensor-core products and exponentials, inner loops first.

    A kernel may process the parts of a tile in an inner loop.
    """

    def holds_both(loop: sass.Loop) -> bool:
        work = sass_paths.work_of(i for block in loop.blocks for i in graph.blocks[block])
        return work is not None and work.multiply_adds > 0 and work.exponentials > 0

    every = [loop for top in sass.loops(graph) for loop in top.walk()]
    return sorted(filter(holds_both, every), key=lambda loop: len(loop.blocks))


def count(function: sass.Function, warps: int, need: Demand) -> list[Counts]:
    """Counts of the paths through the tile loop that do the work ``need``, by exponentials per pair.

    Raises:
        ModelError: no path does that work.
    """
    graph = sass.control_flow(function)
    longer = sass_paths.without_skips(graph)
    seen: list[sass_paths.Work] = []
    for step in (need.step, 0):
        for tiles in (1, 2, 4):  # nvcc may unroll the loop
            for loop in tile_loops(graph):
                found: dict[int, Counts] = {}
                asked = need._replace(step=step)
                low = _cheapest(graph, loop, asked, tiles, seen)
                high = _cheapest(longer, loop, asked, tiles, seen) if low else {}
                for exponentials, path in low.items():
                    most = high.get(exponentials, path).issued
                    counts = _tally(graph, path, most, warps, tiles, exponentials, step == need.step)
                    if exponentials not in found or counts.issued < found[exponentials].issued:
                        found[exponentials] = counts
                if found:
                    return [found[key] for key in sorted(found)]
    closest = sorted(set(seen), reverse=True)[:8]
    listed = "; ".join(f"{w.multiply_adds}, {w.exponentials}, {w.copied}" for w in closest)
    raise ModelError(
        f"{function.name}: no path through a tile loop does what a warp must for one column tile, "
        f"{need.multiply_adds} multiply-adds, {need.pairs} exponentials a lane or twice as many, "
        f"{need.copied} bytes copied. Found: {listed or 'no loop with both products and exponentials'}"
    )


def _cheapest(
    graph: sass.Graph, loop: sass.Loop, need: Demand, tiles: int, seen: list[sass_paths.Work]
) -> dict[int, sass_paths.Path]:
    limit = sass_paths.Limit(
        tiles * need.multiply_adds, 3 * tiles * need.pairs - 1, tiles * need.copied, need.step, need.trips
    )
    found: dict[int, sass_paths.Path] = {}
    for work, path in sass_paths.loop_paths(graph, loop, limit).items():
        seen.append(work)
        exponentials = work.exponentials // (tiles * need.pairs)
        if (work.multiply_adds, work.copied) != (limit.multiply_adds, limit.copied) or exponentials == 0:
            continue
        if exponentials not in found or path.issued < found[exponentials].issued:
            found[exponentials] = path
    return found


def _tally(
    graph: sass.Graph,
    path: sass_paths.Path,
    most_issued: int,
    warps: int,
    tiles: int,
    exponentials: int,
    even: bool,
) -> Counts:
    scale = warps / tiles
    instructions: Counter[str] = Counter()
    products = low = high = copied = 0
    for block, times in path.times.items():
        for instruction in graph.blocks[block]:
            instructions[classify(instruction)] += times
            products += times * sass_paths.multiply_adds(instruction.opcode)
            copied += times * sass_paths.copied_bytes(instruction.opcode)
            least, most = wavefronts(instruction)
            low, high = low + times * least, high + times * most
    return Counts(
        {name: scale * number for name, number in sorted(instructions.items())},
        (scale * path.issued, scale * max(most_issued, path.issued)),
        scale * products,
        (scale * low, scale * high),
        scale * copied,
        exponentials,
        even,
    )
