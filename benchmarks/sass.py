"""Reads disassembled kernels (SASS): instructions, control flow graph, loops, and what the paths through a
loop issue.

A tile loop holds branches that a run hardly ever takes, such as the masks of tiles with more than one class.
So blocks are not summed up: ``loop_paths`` walks every path through one iteration, inner loops included, and
keeps the path of fewest instructions among those that do the same work (products, exponentials, copied bytes).
Branches are not correlated: a path that skips a copy in one step could take two in the next. ``Limit.step``
excludes that: between two barriers at least so many bytes are copied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P[T0-9]+)\s+)?(?P<opcode>[A-Z][A-Z0-9_a-z.]*)\s*"
    r"(?P<operands>[^;]*?)\s*;"
)
_LABEL = re.compile(r"^(?P<label>[.$\w]+):\s*$")
_SECTION = re.compile(r"^\.text\.(?P<name>\S+):\s*$|^\s*Function : (?P<function>\S+)\s*$")
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)|(?P<address>0x[0-9a-f]+)$")
#: Opcodes after which a block ends. A CALL returns, mostly (_far_jumps); BSYNC goes on behind itself.
_JUMPS = ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "KILL", "BPT")


class Instruction(NamedTuple):
    address: int
    guard: str
    """predicate that it is executed under; "" for always"""
    opcode: str
    """with its modifiers, LDSM.16.M88.4"""
    operands: str
    target: int | None
    """address that it jumps to"""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_conditional(self) -> bool:
        """Whether a jump may also not be taken: it has a guard, or a predicate before its target."""
        before_target = re.split(r"`\(|\b0x", self.operands)[0].strip(" ,")
        return self.guard not in ("", "PT") or (self.name in ("BRA", "JMP") and before_target != "")


class Function(NamedTuple):
    name: str
    """mangled"""
    instructions: list[Instruction]


def parse(text: str) -> list[Function]:
    """The functions in what ``nvdisasm -c`` or ``cuobjdump -sass`` printed."""
    found: list[Function] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    raw: list[tuple[str, list[re.Match[str]]]] = []
    for line in text.splitlines():
        section, label = _SECTION.match(line), _LABEL.match(line)
        if section:
            raw.append((section["name"] or section["function"], []))
        elif label:
            waiting.append(label["label"])
        elif raw and (match := _INSTRUCTION.search(line)):
            raw[-1][1].append(match)
            labels |= dict.fromkeys(waiting, int(match["address"], 16))
            waiting.clear()
    for name, matches in raw:
        instructions = [
            Instruction(
                int(m["address"], 16), m["guard"] or "", m["opcode"], m["operands"], _target(m, labels)
            )
            for m in matches
        ]
        if instructions:
            found.append(Function(name, instructions))
    return found


def _target(instruction: re.Match[str], labels: Mapping[str, int]) -> int | None:
    if instruction["opcode"].partition(".")[0] not in ("BRA", "JMP", "CALL"):
        return None
    target = _TARGET.search(instruction["operands"])
    if target is None:
        return None
    return int(target["address"], 16) if target["address"] else labels.get(target["label"])


@dataclass
class Graph:
    """Basic blocks by the address they start at, and the blocks that may follow each."""

    blocks: dict[int, list[Instruction]]
    successors: dict[int, list[int]]


def control_flow(function: Function) -> Graph:
    graph = _graph(function.instructions, frozenset())
    return _graph(function.instructions, _far_jumps(graph))


def _graph(instructions: list[Instruction], far_jumps: frozenset[int]) -> Graph:
    targets = {i.target for i in instructions if i.target is not None}
    blocks: dict[int, list[Instruction]] = {}
    current: list[Instruction] = []
    for instruction in instructions:
        if not current or instruction.address in targets or _ends(current[-1], far_jumps):
            current = blocks[instruction.address] = []
        current.append(instruction)
    starts = list(blocks)
    successors: dict[int, list[int]] = {}
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        last = blocks[start][-1]
        jumps = last.target is not None and _ends(last, far_jumps)
        after = [last.target] if jumps else []
        if following is not None and (not _ends(last, far_jumps) or last.is_conditional):
            after.append(following)
        successors[start] = [a for a in dict.fromkeys(after) if a in blocks]
    return Graph(blocks, successors)


def _ends(instruction: Instruction, far_jumps: frozenset[int]) -> bool:
    return instruction.name in _JUMPS or instruction.address in far_jumps


def _far_jumps(graph: Graph) -> frozenset[int]:
    """Calls that never return: ptxas also writes CALL for a jump that is too far for a BRA."""
    found = set()
    for instruction in (i for block in graph.blocks.values() for i in block if i.name == "CALL"):
        todo, seen = [instruction.target], set()
        while todo:
            block = todo.pop()
            if block in graph.blocks and block not in seen:
                seen.add(block)
                todo += graph.successors[block]
        if seen and not any(graph.blocks[b][-1].name == "RET" for b in seen if b is not None):
            found.add(instruction.address)
    return frozenset(found)


def without_skips(graph: Graph, longest: int = 64) -> Graph:
    """The graph in which short stretches that a branch could skip are always executed.

    Only stretches without products, exponentials, copies and barriers: address arithmetic of valid rows, the
    decision which kind of tile this is. The truth lies between a path of this graph and one of the original.
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
    """Whether a stretch without work leads from one block to another, and nowhere else."""
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


@dataclass
class Loop:
    header: int
    blocks: set[int]
    children: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        yield self
        for child in self.children:
            yield from child.walk()


def loops(graph: Graph, within: Iterable[int] | None = None) -> list[Loop]:
    """The outermost loops among ``within`` (None: all blocks), each with its inner loops."""
    inside = set(graph.blocks if within is None else within)
    edges = {b: [s for s in graph.successors[b] if s in inside] for b in inside}
    return _loops(edges, graph.successors)


def _loops(edges: dict[int, list[int]], all_edges: Mapping[int, list[int]]) -> list[Loop]:
    found = []
    for component in _components(edges):
        if len(component) == 1 and not any(b in edges[b] for b in component):
            continue
        entered = {s for b, after in all_edges.items() if b not in component for s in after if s in component}
        header = min(entered or component)
        inner = {b: [s for s in edges[b] if s in component and s != header] for b in component}
        found.append(Loop(header, set(component), _loops(inner, inner)))
    return sorted(found, key=lambda loop: loop.header)


def _components(edges: Mapping[int, list[int]]) -> list[set[int]]:
    """Strongly connected components (Kosaraju, without recursion), sources first."""
    order: list[int] = []
    seen: set[int] = set()
    for root in sorted(edges):
        stack = [(root, iter(edges[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            node, rest = stack[-1]
            child = next((c for c in rest if c not in seen), None)
            if child is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(child)
                stack.append((child, iter(edges[child])))
    reverse: dict[int, list[int]] = {node: [] for node in edges}
    for node, after in edges.items():
        for child in after:
            reverse[child].append(node)
    found, done = [], set()
    for root in reversed(order):
        if root in done:
            continue
        component, todo = set(), [root]
        done.add(root)
        while todo:
            node = todo.pop()
            component.add(node)
            todo += [p for p in reverse[node] if p not in done and not done.add(p)]  # type: ignore[func-returns-value]
        found.append(component)
    return found


class Work(NamedTuple):
    """What one warp does on a path."""

    multiply_adds: int = 0
    """on tensor cores"""
    exponentials: int = 0
    """MUFU.EX2"""
    copied: int = 0
    """bytes copied by cp.async between the path's first and last barrier"""
    before: int = 0
    """bytes copied before the first barrier; all of them where there is none"""
    after: int = 0
    """bytes copied after the last barrier"""
    barrier: bool = False


class Path(NamedTuple):
    issued: int
    """instructions"""
    times: Counter[int]
    """how often each block is executed"""


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
    """Bytes a thread moves: 4 unless the opcode says otherwise."""
    modifiers = opcode.split(".")
    return 16 if "128" in modifiers else 8 if "64" in modifiers else 4


@dataclass(frozen=True)
class Limit:
    """Which paths are followed.

    Attributes:
        multiply_adds, exponentials: no path with more.
        copied: more bytes count as these.
        step: no path that copies fewer bytes between two barriers.
        trips: inner loops with products on tensor cores run at most so often; other loops run once.
    """

    multiply_adds: int
    exponentials: int
    copied: int
    step: int
    trips: int


_ANYTHING = Limit(1 << 62, 1 << 62, 1 << 62, 0, 1)


def work_of(instructions: Iterable[Instruction], limit: Limit = _ANYTHING) -> Work | None:
    """Work of consecutive instructions; None if it is beyond the limit."""
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
    arrived: dict[int, Paths] = {loop.header: {Work(): Path(0, Counter())}}
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
            block = {} if work is None else {work: Path(len(instructions), Counter({node: 1}))}
            passed = _joined(here, block, limit)
            for target in graph.successors[node]:
                deliver(target, passed)
    return cycle, exits


def _whole(graph: Graph, loop: Loop, limit: Limit) -> dict[int, Paths]:
    """An inner loop from entry to exit, for every number of trips. Loops without products are run once."""
    cycle, exits = _walk(graph, loop, limit)
    repeated: Paths = {Work(): Path(0, Counter())}
    turns: Paths = dict(repeated)
    if any(work.multiply_adds for work in cycle):
        for _ in range(limit.trips):
            turns = _joined(turns, cycle, limit)
            _merge(repeated, turns)
    return {target: _joined(repeated, paths, limit) for target, paths in exits.items()}


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
                found[work] = Path(issued, left.times + right.times)
    return found


def _merge(into: Paths, paths: Paths) -> None:
    for work, path in paths.items():
        if work not in into or path.issued < into[work].issued:
            into[work] = path
