"""Facts of every check, read from the rules' source files without importing them: their imports take seconds."""

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks.rule import Rule

RULES = Path(__file__).parent / "rules"


@dataclass(frozen=True)
class FaultFacts:
    """A planted fault, without what plants it."""

    name: str
    description: str


@dataclass(frozen=True)
class CheckFacts:
    """A rule, without what checks; see `checks.rule.Rule`. `documentation` is the docstring of its file."""

    code: str
    name: str
    stage: str
    severity: str
    sources: tuple[str, ...]
    requires: tuple[str, ...]
    documentation: str
    faults: tuple[FaultFacts, ...]
    plugin: str = ""


def facts_of(rule: Rule) -> CheckFacts:
    """Return the facts of an imported rule."""
    return CheckFacts(
        code=rule.code,
        name=rule.name,
        stage=rule.stage,
        severity=rule.severity,
        sources=rule.sources,
        requires=rule.requires,
        documentation=inspect.cleandoc(rule.documentation),
        faults=tuple(FaultFacts(fault.name, fault.description) for fault in rule.faults),
        plugin=rule.plugin,
    )


def read_catalogue(folder: Path = RULES) -> tuple[CheckFacts, ...]:
    """Read the facts of every check, in the order of `RULES`.

    Raises:
        ValueError: a file has no literal `RULES` or `RULE`, or a fact in it is computed.
    """
    listed = _assigned(_parse(folder / "__init__.py"), "RULES")
    if not isinstance(listed, ast.Tuple):
        raise ValueError(f"{folder / '__init__.py'}: RULES must be a tuple of MODULE.RULE")
    names = [ast.unparse(item).partition(".")[0] for item in listed.elts]
    return tuple(_read_rule(folder / f"{name}.py") for name in names)


def _read_rule(path: Path) -> CheckFacts:
    """Read the docstring of a rule's file and the literals of its `RULE = Rule(...)`."""
    tree = _parse(path)
    call = _assigned(tree, "RULE")
    if not isinstance(call, ast.Call):
        raise ValueError(f"{path.name}: RULE must be a call of Rule with keywords")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    faults = [_read_fault(path, fault) for fault in getattr(given.get("faults"), "elts", ())]
    keys = ("code", "name", "stage", "severity", "sources", "requires")
    facts = {key: _literal(path, given[key]) for key in keys if key in given}
    documentation = ast.get_docstring(tree) or ""
    return CheckFacts(**{"requires": (), **facts}, documentation=documentation, faults=tuple(faults))


def _read_fault(path: Path, node: ast.expr) -> FaultFacts:
    """Read the first two arguments of `Fault(name, description, plant)`."""
    arguments = node.args[:2] if isinstance(node, ast.Call) else []
    return FaultFacts(*(_literal(path, argument) for argument in arguments))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """Return what a module assigns to a name at its top level."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return getattr(node, "value", None)
    return None


def _literal(path: Path, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{path.name}:{node.lineno}: a fact must be a literal. Got {ast.unparse(node)}") from None
