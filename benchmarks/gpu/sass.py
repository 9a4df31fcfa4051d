"""Parses disassembled kernels (SASS): instructions, the control flow graph and its loops.

sass_paths.py counts the work of the paths through a loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P[T0-9]+)\s+)?(?P<opcode>[A-Z][A-Z0-9_a-z.]*)\s*"
    r"(?P<operands>[^;]*?)\s*;"
)
_LABEL = re.compile(r"^(?P<label>[.$\w]+):\s*$")
_SECTION = re.compile(r"^\.text\.(?P<name>\S+):\s*$|^\s*Function : (?P<function>\S+)\s*$")
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)|(?P<address>0x[0-9a-f]+)$")
_JUMP_TABLE = re.compile(r"BRANCH_TARGETS (?P<labels>[.$\w,]+)")
#: Opcodes that end a block. Most CALLs return (_far_jumps); after BSYNC the next instruction follows.
_JUMPS = ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "KILL", "BPT")


class Instruction(NamedTuple):
    address: int
    guard: str
    """predicate of the instruction; "" if it has none"""
    opcode: str
    """opcode with modifiers, such as LDSM.16.M88.4"""
    operands: str
    targets: tuple[int, ...]
    """target addresses of a jump: one, or those of a jump table (BRX)"""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_conditional(self) -> bool:
        """Whether a jump is conditional: it has a guard, or a predicate before its target."""
        before_target = re.split(r"`\(|\b0x", self.operands)[0].strip(" ,")
        return self.guard not in ("", "PT") or (self.name in ("BRA", "JMP") and before_target != "")


class Function(NamedTuple):
    name: str
    """mangled name"""
    instructions: list[Instruction]


def parse(text: str) -> list[Function]:
    """The functions in the output of ``nvdisasm -c`` or ``cuobjdump -sass``."""
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
                int(m["address"], 16), m["guard"] or "", m["opcode"], m["operands"], _targets(m, labels)
            )
            for m in matches
        ]
        if instructions:
            found.append(Function(name, instructions))
    return found


def _targets(instruction: re.Match[str], labels: Mapping[str, int]) -> tuple[int, ...]:
    name, operands = instruction["opcode"].partition(".")[0], instruction["operands"]
    if name in ("BRX", "JMX") and (table := _JUMP_TABLE.search(operands)):
        return tuple(labels[label] for label in table["labels"].split(",") if label in labels)
    if name not in ("BRA", "JMP", "CALL") or not (target := _TARGET.search(operands)):
        return ()
    if target["address"]:
        return (int(target["address"], 16),)
    return (labels[target["label"]],) if target["label"] in labels else ()


@dataclass
class Graph:
    """Basic blocks by start address, and the successors of each block."""

    blocks: dict[int, list[Instruction]]
    successors: dict[int, list[int]]


def control_flow(function: Function) -> Graph:
    graph = _graph(function.instructions, frozenset())
    return _graph(function.instructions, _far_jumps(graph))


def _graph(instructions: list[Instruction], far_jumps: frozenset[int]) -> Graph:
    targets = {target for i in instructions for target in i.targets}
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
        after = list(last.targets) if _ends(last, far_jumps) else []
        if following is not None and (not _ends(last, far_jumps) or last.is_conditional):
            after.append(following)
        successors[start] = [a for a in dict.fromkeys(after) if a in blocks]
    return Graph(blocks, successors)


def _ends(instruction: Instruction, far_jumps: frozenset[int]) -> bool:
    return instruction.name in _JUMPS or instruction.address in far_jumps


def _far_jumps(graph: Graph) -> frozenset[int]:
    """Calls that never return: ptxas also uses CALL for jumps that are too far for a BRA."""
    found = set()
    for instruction in (i for block in graph.blocks.values() for i in block if i.name == "CALL"):
        todo, seen = list(instruction.targets), set()
        while todo:
            block = todo.pop()
            if block in graph.blocks and block not in seen:
                seen.add(block)
                todo += graph.successors[block]
        if seen and not any(graph.blocks[b][-1].name == "RET" for b in seen):
            found.add(instruction.address)
    return frozenset(found)


@dataclass
class Loop:
    header: int
    blocks: set[int]
    children: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        yield self
        for child in self.children:
            yield from child.walk()


def loops(graph: Graph) -> list[Loop]:
    """The outermost loops, each with its inner loops."""
    return _loops(graph.successors, graph.successors)


def _loops(edges: Mapping[int, list[int]], all_edges: Mapping[int, list[int]]) -> list[Loop]:
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
            fresh = [p for p in reverse[node] if p not in done]
            done.update(fresh)
            todo += fresh
        found.append(component)
    return found
