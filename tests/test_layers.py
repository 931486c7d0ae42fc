"""The direction of dependencies, derived from the folders: `d2l` ← `checks` ← `commands` ← `cli`, and floor by floor."""

import ast
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support.layers import PACKAGES, Graph, Import, circles, declared_floors, read_graph, room, wrong_imports

ROOT = Path(__file__).resolve().parents[1]
FLOORS = declared_floors(ROOT)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """The imports of this tree."""
    return read_graph(ROOT)


def test_every_room_stands_on_one_floor(graph: Graph) -> None:
    rooms = sorted({room(module).removeprefix("d2l.") for module in graph.modules if module.startswith("d2l.")})
    assert rooms == sorted(name for floor in FLOORS for name in floor)


def test_imports_go_downwards(graph: Graph) -> None:
    assert wrong_imports(graph, FLOORS) == []


def test_no_two_modules_import_each_other_in_a_circle(graph: Graph) -> None:
    assert circles(graph.arrows({module: module for module in graph.modules})) == []


def test_an_import_upwards_is_seen_on_every_floor(tmp_path: Path) -> None:
    """In a copy of the tree, a file of each floor imports the floor above or beside it."""
    floors = [*([f"d2l.{name}" for name in floor] for floor in FLOORS), *([package] for package in PACKAGES)]
    for package in PACKAGES:
        source = ROOT / package
        if source.is_dir():
            shutil.copytree(source, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    shutil.copy(ROOT / "cli.py", tmp_path)
    planted = []
    for floor, above in pairwise(floors):
        higher = floor[1] if len(floor) > 1 else above[0]
        path = tmp_path / floor[0].replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        file.write_text(f"{file.read_text(encoding='utf-8')}\nimport {higher}\n", encoding="utf-8")
        planted.append((floor[0], higher))
    found = [line.split(" imports ") for line in wrong_imports(read_graph(tmp_path), FLOORS)]
    assert sorted((importer.partition(":")[0], imported) for importer, imported in found) == sorted(planted)


def test_rooms_beside_each_other_may_not_import_each_other() -> None:
    graph = Graph(
        frozenset({"d2l.train.run", "d2l.inference.load"}), (Import("d2l.train.run", "d2l.inference.load", 1),)
    )
    assert wrong_imports(graph, FLOORS) == ["d2l.train.run:1 imports d2l.inference.load"]


def test_no_library_module_prints() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("d2l", "checks")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls
