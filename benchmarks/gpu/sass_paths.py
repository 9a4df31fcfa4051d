"""Finds the paths through a loop of a disassembled kernel, their work and their numbers of instructions.

A tile loop has branches that are rarely executed, such as the masks of tiles with more than one class, so the
sum over all blocks would be too large. ``loop_paths`` follows every path through one iteration, including
inner loops. Among paths with the same work (products, exponentials, copied bytes) it keeps the one with the
fewest instructions. Branches are not correlated: a path that skips a copy in one step could take two in the
next. ``Limit.step`` excludes such paths: at least so many bytes must be copied between two barriers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu.sass import Graph, Instruction, Loop


class Work(NamedTuple):
    """The work of one warp on a path."""

    multiply_adds: int = 0
    """multiply-adds on tensor cores"""
    exponentials: int = 0
    """number of MUFU.EX2"""
    copied: int = 0
    """bytes copied by cp.async between the path's first and last barrier"""
    before: int = 0
    """bytes copied before the first barrier; all bytes if there is no barrier"""
    after: int = 0
    """bytes copied after the last barrier"""
    barrier: bool = False


class Path(NamedTuple):
    issued: int
    """number of instructions"""
    parts: tuple[int | Path, ...] = ()
    """addresses of its blocks, and the paths that it consists of"""

    @property
    def times(self) -> Counter[int]:
        """Number of executions of each block."""
        found: Counter[int] = Counter()
        todo: list[int | Path] = [self]
        while todo:
            part = todo.pop()
            if isinstance(part, Path):
                todo += part.parts
            else:
                found[part] += 1
        return found


Paths = dict[Work, Path]


def multiply_adds(opcode: str) -> int:
    """HMMA.16816.F32.BF16 -> 16 * 8 * 16."""
    shape = {"16816": 2048, "1688": 1024, "1684": 512}
    parts = opcode.split(".")
    if parts[0] != "HMMA":
        return 0
    if len(parts) < 2 or parts[1] not in shape:
        raise ValueError(f"unknown shape of a tensor-core instruction: {opcode}")
    return shape[parts[1]]


def copied_bytes(opcode: str) -> int:
    """Bytes that one warp's LDGSTS copies."""
    return 32 * width(opcode) if opcode.startswith("LDGSTS") else 0


def width(opcode: str) -> int:
    """Bytes that a thread moves: 4 unless the opcode has a width."""
    modifiers = opcode.split(".")
    return 16 if "128" in modifiers else 8 if "64" in modifiers else 4


@dataclass(frozen=True)
class Limit:
    """Limits of the paths that are followed.

    Attributes:
        multiply_adds: maximum of a path.
        exponentials: maximum of a path.
        copied: more copied bytes count as this number.
        step: minimal number of bytes copied between two barriers.
        trips: maximal trip count of inner loops with tensor-core products; other loops run once.
    """

    multiply_adds: int
    exponentials: int
    copied: int
    step: int
    trips: int


_ANYTHING = Limit(1 << 62, 1 << 62, 1 << 62, 0, 1)


def work_of(instructions: Iterable[Instruction], limit: Limit = _ANYTHING) -> Work | None:
    """Work of consecutive instructions; None if it exceeds the limit."""
    work: Work | None = Work()
    for instruction in instructions:
        one = Work(
            multiply_adds(instruction.opcode),
            int(instruction.opcode.startswith("MUFU.EX2")),
            before=copied_bytes(instruction.opcode),
            barrier=instruction.name == "BAR",
        )
        if any(one) and work is not None:
            work = _sum(work, one, limit)
    return work


def _sum(first: Work, second: Work, limit: Limit) -> Work | None:
    products = first.multiply_adds + second.multiply_adds
    exponentials = first.exponentials + second.exponentials
    if products > limit.multiply_adds or exponentials > limit.exponentials:
        return None
    middle = min(first.after + second.before, limit.copied)
    if not first.barrier:
        before = min(first.before + second.before, limit.copied)
        return Work(products, exponentials, second.copied, before, second.after, second.barrier)
    if not second.barrier:
        return Work(products, exponentials, first.copied, first.before, middle, True)
    if middle < limit.step:
        return None
    copied = min(first.copied + middle + second.copied, limit.copied)
    return Work(products, exponentials, copied, first.before, second.after, True)


def _closed(work: Work, limit: Limit) -> Work | None:
    """Of a path that comes back to where it began."""
    around = work.before + work.after
    if around < limit.step:
        return None
    return Work(work.multiply_adds, work.exponentials, min(work.copied + around, limit.copied))


def loop_paths(graph: Graph, loop: Loop, limit: Limit) -> Paths:
    """One iteration of ``loop``, from its header back to it: the shortest path for each amount of work."""
    found: Paths = {}
    for work, path in _walk(graph, loop, limit)[0].items():
        closed = _closed(work, limit)
        if closed is not None:
            _merge(found, {closed: path})
    return found


def _walk(graph: Graph, loop: Loop, limit: Limit) -> tuple[Paths, dict[int, Paths]]:
    """(paths that come back to the header, paths that leave the loop, by the block they leave to)."""
    inner = {block: child for child in loop.children for block in child.blocks}
    arrived: dict[int, Paths] = {loop.header: {Work(): Path(0)}}
    cycle: Paths = {}
    exits: dict[int, Paths] = {}

    def deliver(target: int, paths: Paths) -> None:
        if target == loop.header:
            _merge(cycle, paths)
        elif target in loop.blocks:
            _merge(arrived.setdefault(target, {}), paths)
        else:
            _merge(exits.setdefault(target, {}), paths)

    for node in _topological(graph, loop, inner):
        here = arrived.get(node, {})
        child = inner.get(node)
        if child is not None:
            for target, paths in _whole(graph, child, limit).items():
                deliver(target, _joined(here, paths, limit))
        else:
            instructions = graph.blocks[node]
            work = work_of(instructions, limit)
            block = {} if work is None else {work: Path(len(instructions), (node,))}
            passed = _joined(here, block, limit)
            for target in graph.successors[node]:
                deliver(target, passed)
    return cycle, exits


def _whole(graph: Graph, loop: Loop, limit: Limit) -> dict[int, Paths]:
    """An inner loop from entry to exit, for every trip count. Loops without products run once.

    A path that leaves the loop after products is also a trip, because the loop condition is at its end.
    """
    cycle, exits = _walk(graph, loop, limit)
    turns: list[Paths] = [{Work(): Path(0)}]
    if any(work.multiply_adds for work in cycle):
        for _ in range(limit.trips):
            turns.append(_joined(turns[-1], cycle, limit))
    found: dict[int, Paths] = {}
    for target, paths in exits.items():
        found[target] = {}
        for work, path in paths.items():
            before = turns[: limit.trips] if work.multiply_adds else turns
            for repeated in before:
                _merge(found[target], _joined(repeated, {work: path}, limit))
    return found


def _topological(graph: Graph, loop: Loop, inner: Mapping[int, Loop]) -> list[int]:
    """Blocks of one iteration in order; an inner loop appears once, as its header."""

    def name(block: int) -> int:
        return inner[block].header if block in inner else block

    order: list[int] = []
    seen: set[int] = {loop.header}
    after: dict[int, set[int]] = {}
    for block in loop.blocks:
        targets = {name(s) for s in graph.successors[block] if s in loop.blocks and s != loop.header}
        after.setdefault(name(block), set()).update(targets - {name(block)})
    stack = [(loop.header, iter(sorted(after.get(loop.header, ()))))]
    while stack:
        node, rest = stack[-1]
        child = next((c for c in rest if c not in seen), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(child)
            stack.append((child, iter(sorted(after.get(child, ())))))
    return order[::-1]


def _joined(first: Paths, second: Paths, limit: Limit) -> Paths:
    found: Paths = {}
    for a, left in first.items():
        for b, right in second.items():
            work = _sum(a, b, limit)
            if work is None:
                continue
            issued = left.issued + right.issued
            if work not in found or issued < found[work].issued:
                found[work] = Path(issued, (left, right))
    return found


def _merge(into: Paths, paths: Paths) -> None:
    for work, path in paths.items():
        if work not in into or path.issued < into[work].issued:
            into[work] = path


def without_skips(graph: Graph, longest: int = 64) -> Graph:
    """The graph in which short conditional sequences are always executed.

    Affects only sequences without products, exponentials, copies and barriers, such as address arithmetic and
    the decision about the kind of a tile. The real count is between those of this graph and of the original.
    """
    edges = {block: list(after) for block, after in graph.successors.items()}
    changed = True
    while changed:
        changed = False
        for block, after in edges.items():
            for first, second in (after, after[::-1]) if len(after) == 2 else ():
                if len(edges[block]) == 2 and _leads_to(first, second, graph, edges, longest):
                    edges[block] = [first]
                    changed = True
    return Graph(graph.blocks, edges)


def _leads_to(start: int, end: int, graph: Graph, edges: Mapping[int, list[int]], longest: int) -> bool:
    """Whether a sequence without work leads from one block only to another one."""
    length, block, seen = 0, start, set()
    while block != end:
        length += len(graph.blocks[block])
        if (
            block in seen
            or length > longest
            or len(edges[block]) != 1
            or work_of(graph.blocks[block]) != Work()
        ):
            return False
        seen.add(block)
        block = edges[block][0]
    return True
