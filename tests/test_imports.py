"""The map of the code in CONTRIBUTING.md: every module belongs to a room, and imports only what its room may
import.

A row may name only rooms of earlier rows, so no import runs upward.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADING = "## Map of the code: who knows what"


def read_map(text: str) -> dict[str, set[str]]:
    """Rooms of the package, as paths relative to the root, with the rooms that they may import."""
    section = text.split(HEADING, 1)[1].split("\n## ", 1)[0]
    rooms: dict[str, set[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 3 or not cells[0].startswith("`pysupcon/"):
            continue
        allowed = {f"pysupcon/{name}" for name in re.findall(r"`([^`]+)`", cells[2])}
        for room in re.findall(r"`([^`]+)`", cells[0]):
            assert room not in rooms, f"{room} has two rows"
            rooms[room] = allowed
    return rooms


def read_imports(root: Path) -> dict[str, set[str]]:
    """Modules by path, with the paths of the modules that they import.

    Imports within functions, under TYPE_CHECKING and by ``import_module("NAME")`` count too.
    """
    paths = {path.relative_to(root).as_posix(): path for path in sorted((root / "pysupcon").rglob("*.py"))}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in paths}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import, which this test does not resolve"
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                imported = submodules & modules.keys() or {str(node.module)}
                if not submodules <= modules.keys():
                    imported.add(str(node.module))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                imported = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            else:
                continue
            graph[name] |= {modules[module] for module in imported if module in modules}
        graph[name].discard(name)
    return graph


def room_of(name: str, rooms: dict[str, set[str]]) -> str | None:
    """The module's own row, else that of its package."""
    package = "/".join(name.split("/")[:2]) + "/"
    return name if name in rooms else package if package in rooms else None


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, in a circle; empty if there are none."""
    remaining = dict(graph)
    while free := [name for name, imported in remaining.items() if not imported & remaining.keys()]:
        for name in free:
            del remaining[name]
    if not remaining:
        return []
    trail = [next(iter(remaining))]
    while trail.count(trail[-1]) == 1:
        trail.append(min(remaining[trail[-1]] & remaining.keys()))
    return trail[trail.index(trail[-1]) :]


ROOMS = read_map((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
GRAPH = read_imports(ROOT)


def test_every_module_has_a_room() -> None:
    assert [name for name in GRAPH if room_of(name, ROOMS) is None] == []
    assert [room for room in ROOMS if room not in {room_of(name, ROOMS) for name in GRAPH}] == []


def test_rows_name_only_earlier_rows() -> None:
    seen: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= seen, f"{room} may import {sorted(allowed - seen)}, which no earlier row holds"
        seen.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_names(room: str) -> None:
    found = {
        (name, target)
        for name, imported in GRAPH.items()
        if room_of(name, ROOMS) == room
        for target in imported
        if room_of(target, ROOMS) not in {room, *ROOMS[room]}
    }
    assert found == set()


def test_no_modules_import_each_other() -> None:
    assert find_cycle(GRAPH) == []


def test_the_test_sees_what_is_wrong(tmp_path: Path) -> None:
    package = tmp_path / "pysupcon"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pysupcon.b\n"
    )
    (package / "b.py").write_text("def f():\n    from pysupcon import a, name\n")
    (package / "c.py").write_text("import importlib\nb = importlib.import_module('pysupcon.b')\n")
    graph = read_imports(tmp_path)
    assert graph["pysupcon/a.py"] == graph["pysupcon/c.py"] == {"pysupcon/b.py"}
    assert graph["pysupcon/b.py"] == {"pysupcon/a.py", "pysupcon/__init__.py"}
    assert find_cycle(graph) == ["pysupcon/a.py", "pysupcon/b.py", "pysupcon/a.py"]
    assert read_map(
        f"{HEADING}\n| `pysupcon/a.py` | | `b/`, `c.py` |\n\n## Next\n| `pysupcon/d` | | |\n"
    ) == {"pysupcon/a.py": {"pysupcon/b/", "pysupcon/c.py"}}
