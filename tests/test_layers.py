"""The direction of dependencies: `d2l` ← `checks` ← `cli`, and inside `d2l` never upstream."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {path.stem for path in ROOT.glob("cli*.py")}

# Each bank of the river may use those before it. What stands above all banks puts them together.
BANKS = ("base", "data", "hypernet", "train")
ABOVE_ALL_BANKS = {"prepare", "adapter", "answer", "evaluate", "scores", "figures", "trained", "reference_import"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("package", "forbidden"), [("d2l", {"checks", *COMMANDS}), ("checks", COMMANDS)])
def test_no_package_imports_what_stands_above_it(package: str, forbidden: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path)
        if name.split(".")[0] in forbidden
    ]
    assert not found


def test_no_bank_reaches_upstream() -> None:
    found = []
    for rank, bank in enumerate(BANKS):
        later = {f"d2l.{name}" for name in (*BANKS[rank + 1 :], *(ABOVE_ALL_BANKS if bank != "train" else ()))}
        for path in sorted((ROOT / "d2l" / bank).glob("*.py")):
            names = {".".join(name.split(".")[:2]) for name in imports(path)}
            found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names & later)]
    assert not found


def test_no_library_module_prints() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("d2l", "checks")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls
