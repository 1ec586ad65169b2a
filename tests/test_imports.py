"""Imports of dcc: rooms by stage, each importing only those below it, and no circle of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (  # the floors of dcc, top to bottom; a room may import those below it (dcc/README.md draws them)
    ("cli",),
    ("report",),
    ("compiler",),
    ("policies",),
    ("search",),
    ("measure",),
    ("serve",),
    ("lower",),
    ("variants",),
    ("discover",),
    ("capture",),
    ("record", "plans"),
    ("passes",),
    ("kernels",),
    ("demo",),
    ("tensor_file",),
    ("arguments", "files"),
    ("decisions", "errors", "quality", "text", "torch_internals"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of dcc by its name; passes and kernels are found through their links."""
    folder = ROOT / "dcc"
    files = [*folder.rglob("*.py")] + [p for room in ("passes", "kernels") for p in (ROOT / room).glob("*.py")]
    found = {}
    for path in sorted(set(map(Path.resolve, files))):
        parts = path.relative_to(folder if path.is_relative_to(folder) else ROOT).with_suffix("").parts
        found[".".join(("dcc", *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of dcc that a file imports anywhere, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            assert node.level == 0, f"{name} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (each if each in known else str(node.module) for each in inner)


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    """An arrow from each file to those that it imports, but for dcc itself, which hands out names when asked."""
    known = modules()
    arrows = [(name, to) for name, path in known.items() for to in imports(name, path, known)]
    return nx.DiGraph([(a, b) for a, b in arrows if a != "dcc" and a != b])


def room(name: str) -> str:
    """The room of a module, or the single file that it is."""
    return name.split(".")[1] if "." in name else ""


def test_every_file_stands_on_a_floor(graph: nx.DiGraph):
    assert {room(name) for name in modules()} - {""} == set(FLOOR)
    assert len(graph) > 90


def test_no_import_goes_up(graph: nx.DiGraph):
    up = [
        f"{a} imports {b}"
        for a, b in graph.edges
        if b != "dcc" and room(a) != room(b) and FLOOR[room(a)] >= FLOOR[room(b)]
    ]
    assert up == []


def test_no_files_import_in_a_circle(graph: nx.DiGraph):
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_no_rooms_import_in_a_circle(graph: nx.DiGraph):
    rooms = nx.DiGraph([(room(a), room(b)) for a, b in graph.edges if room(a) != room(b)])
    assert nx.is_directed_acyclic_graph(rooms)


def test_only_the_command_line_imports_the_front(graph: nx.DiGraph):
    assert [a for a, b in graph.edges if b == "dcc"] == ["dcc.cli"]


def test_dcc_itself_holds_few_files():
    assert len(list((ROOT / "dcc").glob("*.py"))) <= 12


def test_position_schedule_and_binding_each_have_a_file():
    files = {path.stem for path in (ROOT / "dcc" / "serve").glob("*.py")}
    assert {"position", "schedule", "binding"} <= files


def private_names_of_others(path: Path, own: set[str]) -> Iterator[str]:
    """Attributes that begin with one underscore, of anything but dcc's own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr not in own:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_private_attributes_of_torch_and_diffusers_are_in_one_file():
    own: set[str] = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    found = [
        line
        for path in modules().values()
        if path.name != "torch_internals.py"
        for line in private_names_of_others(path, own)
    ]
    assert found == []
