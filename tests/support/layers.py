"""The import graph of the project: its modules, rooms and floors, and the imports that go the wrong way.

`python tests/support/layers.py [ROOT]` prints it.
"""

import ast
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("d2l", "checks", "commands", "cli")  # each may import those before it
FLOORS_INDENT = "    "


@dataclass(frozen=True)
class Import:
    """A module of the project that imports another one, at a line of its file."""

    importer: str
    imported: str
    line: int


@dataclass(frozen=True)
class Graph:
    """Modules by dotted name, and every import between two of them."""

    modules: frozenset[str]
    imports: tuple[Import, ...]

    def arrows(self, name: Mapping[str, str]) -> Counter[tuple[str, str]]:
        """Return pairs of different groups, importer first, with the number of pairs of modules behind each.

        Args:
            name: module → its group.
        """
        pairs = {(it.importer, it.imported) for it in self.imports}
        return Counter((name[a], name[b]) for a, b in pairs if name[a] != name[b])


def read_graph(root: Path) -> Graph:
    """Read every import in the files of the project, wherever in a file it stands."""
    files = {_module(path.relative_to(root)): path for path in _files(root)}
    found = [
        Import(importer, imported, line)
        for importer, path in files.items()
        for line, imported in _imports(path, files.keys())
        if imported != importer
    ]
    return Graph(frozenset(files), tuple(found))


def room(module: str) -> str:
    """Return the room of a module: in d2l a folder or module right below it, else the package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "d2l" else parts[0]


def declared_floors(root: Path) -> list[list[str]]:
    """Read the floors of d2l, from the ground up, off the docstring of `d2l/__init__.py`."""
    text = ast.get_docstring(ast.parse((root / "d2l" / "__init__.py").read_text(encoding="utf-8")), clean=True) or ""
    return [line.split() for line in text.splitlines() if line.startswith(FLOORS_INDENT)]


def wrong_imports(graph: Graph, floors: Sequence[Sequence[str]]) -> list[str]:
    """List every import that does not go downwards, one line each."""
    height = {f"d2l.{name}": level for level, names in enumerate(floors) for name in names}
    height |= {package: len(floors) + level for level, package in enumerate(PACKAGES)}  # d2l itself is the public face
    return [
        f"{it.importer}:{it.line} imports {it.imported}"
        for it in graph.imports
        if room(it.importer) != room(it.imported) and height[room(it.imported)] >= height[room(it.importer)]
    ]


def circles(arrows: Counter[tuple[str, str]]) -> list[set[str]]:
    """Return the groups that import each other in a circle (Tarjan's strongly connected components, plainly)."""
    below: dict[str, set[str]] = {}
    for importer, imported in arrows:
        below.setdefault(importer, set()).add(imported)
    reach = {name: _reachable(name, below) for name in below}
    found = {frozenset({other for other in reach[name] if name in reach.get(other, set())}) for name in reach}
    return [set(circle) for circle in found if circle]


def measured_floors(arrows: Counter[tuple[str, str]], groups: Sequence[str]) -> list[list[str]]:
    """Put groups on floors, each just above the highest that it imports; only without circles."""
    floors: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in floors:
            floors[name] = 1 + max((floor(b) for a, b in arrows if a == name), default=-1)
        return floors[name]

    height = max(map(floor, groups)) + 1
    return [sorted(name for name in groups if floors[name] == level) for level in range(height)]


def modules_entered(graph: Graph, start: str) -> int:
    """Count the modules of the project that importing one runs, itself included."""
    below: dict[str, set[str]] = {}
    for it in graph.imports:
        below.setdefault(it.importer, set()).add(it.imported)
    return len(_reachable(start, below) | {start})


def describe(root: Path) -> str:
    """Return the graph as text: counts, floors from the top, and arrows."""
    graph = read_graph(root)
    rooms = {module: room(module) for module in graph.modules}
    of_d2l = {module: name for module, name in rooms.items() if name.startswith("d2l.")}
    inner = Graph(
        frozenset(of_d2l), tuple(it for it in graph.imports if it.importer in of_d2l and it.imported in of_d2l)
    )
    arrows = inner.arrows(of_d2l)
    names = sorted(set(of_d2l.values()))
    lines = [f"modules  {len(graph.modules)} ({len(of_d2l)} in d2l)", f"rooms    {len(names)} in d2l"]
    found = circles(arrows)
    lines += [
        f"arrows   {len(arrows)} between rooms of d2l, {len(set(inner.arrows({m: m for m in of_d2l})))} between modules"
    ]
    lines += [f"circle   {', '.join(sorted(circle))}" for circle in found]
    if not found:
        floors = measured_floors(arrows, names)
        lines += [f"floors   {len(floors)}", ""]
        lines += ["  ".join(name.removeprefix("d2l.") for name in floor) for floor in reversed(floors)]
    lines += [
        "",
        *(f"{a.removeprefix('d2l.')} -> {b.removeprefix('d2l.')}  {n}" for (a, b), n in sorted(arrows.items())),
    ]
    return "\n".join(lines)


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py")) if (root / package).is_dir() else sorted(root.glob("cli*.py"))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield line and module for every module of the project that a file imports."""
    names = set(known)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = whole if whole in names else node.module or ""
                if found in names:
                    yield node.lineno, found


def _reachable(start: str, below: Mapping[str, set[str]]) -> set[str]:
    """Return everything that can be reached from `start`, itself only by a circle."""
    seen: set[str] = set()
    waiting = list(below.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += below.get(name, ())
    return seen


if __name__ == "__main__":
    sys.stdout.write(describe(Path(sys.argv[1] if len(sys.argv) > 1 else ".")) + "\n")
