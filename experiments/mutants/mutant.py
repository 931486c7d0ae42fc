"""A mutant: a bug that is planted into one function, method or constant of `d2l` by the text of its source.

A function's code object is exchanged in place, so that every importer, table, decorator and subclass that holds the
function runs the mutant; a constant is exchanged in every module of `d2l` that imported it.
"""

import __future__

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

_MARK = "_the_mutant_was_reached"
_NO_ANNOTATIONS = __future__.annotations.compiler_flag  # their names need not exist at run time


class DoesNotApplyError(Exception):
    """The text to replace is not in the symbol exactly once, or the result is no function that can take its place."""


@dataclass(frozen=True)
class Mutant:
    """A bug.

    Attributes:
        area: part of the project, for the table.
        name: what the bug does, in words joined by hyphens; unique.
        symbol: dotted path of a function, method, property or constant, such as `d2l.train.losses:Normalizer.of`.
        old, new: the text in the symbol's source, exactly once, and what replaces it.
        why: how it spoils a run.
        witness: name of the function in `witnesses.WITNESSES` whose values it changes.
        judgement: of a survivor, `equivalent: REASON` or `outside the claims: REASON`; empty: a hole.
    """

    area: str
    name: str
    symbol: str
    old: str
    new: str
    why: str
    witness: str
    judgement: str = ""

    @property
    def counts(self) -> bool:
        """Whether the mutant counts in the kill rate."""
        return not self.judgement


def bugs(area: str, symbol: str, witness: str, *rows: tuple[str, ...]) -> list[Mutant]:
    """Make the mutants of one symbol from rows of name, old, new, why and, where there is one, a judgement."""
    return [Mutant(area, name, symbol, old, new, why, witness, *rest) for name, old, new, why, *rest in rows]


class Planted:
    """A planted mutant; `was_reached` tells whether its code ran since."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    @property
    def was_reached(self) -> bool:
        return bool(vars(self._module).get(_MARK))


@contextmanager
def planted(mutant: Mutant) -> Iterator[Planted]:
    """Plant a mutant for a scope.

    Raises:
        DoesNotApplyError: the mutant is not one of the present code.
    """
    module_name, _, path = mutant.symbol.partition(":")
    module = import_module(module_name)
    setattr(module, _MARK, [])
    found = _find(module, path)
    undo = _exchange_constant(module, path, mutant) if found is None else _exchange_code(module, path, found, mutant)
    try:
        yield Planted(module)
    finally:
        undo()
        delattr(module, _MARK)


def _find(module: ModuleType, path: str) -> FunctionType | None:
    """Return the plain function of a symbol, out of whatever wraps it; None for a constant."""
    holder: Any = module
    *outer, last = path.split(".")
    for name in outer:
        holder = getattr(holder, name)
    if last not in vars(holder):
        raise DoesNotApplyError(f"{module.__name__} has no {path}")
    return _unwrap(vars(holder)[last])


def _unwrap(value: Any) -> FunctionType | None:
    """Take a function out of a property, a class or static method, a cache and decorators."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    elif isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _replace(source: str, mutant: Mutant) -> str:
    count = source.count(mutant.old)
    if count != 1:
        raise DoesNotApplyError(f"{mutant.name}: {mutant.old!r} is {count} times in {mutant.symbol}, expected once")
    if mutant.old == mutant.new:
        raise DoesNotApplyError(f"{mutant.name}: nothing is replaced")
    return source.replace(mutant.old, mutant.new)


def _exchange_code(module: ModuleType, path: str, function: FunctionType, mutant: Mutant) -> Any:
    """Put the mutated code into a function; return what restores it."""
    changed = _compile(module, path, textwrap.dedent(_replace(inspect.getsource(function), mutant)))
    if changed.__code__.co_freevars != function.__code__.co_freevars:
        raise DoesNotApplyError(f"{mutant.name}: the mutant closes over other variables than {mutant.symbol}")
    kept = function.__code__, function.__defaults__, function.__kwdefaults__

    def put(code: Any, defaults: Any, named: Any) -> None:
        function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, named
        _clear_caches(module)

    put(changed.__code__, changed.__defaults__, changed.__kwdefaults__)
    return lambda: put(*kept)


def _compile(module: ModuleType, path: str, source: str) -> FunctionType:
    """Compile a function's source where it stands, in a class of the same name for a method, with a mark at its start."""
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    mark = ast.parse(f"{_MARK}.append(1)").body
    has_docstring = ast.get_docstring(definition) is not None
    definition.body[has_docstring:has_docstring] = mark
    *outer, name = path.split(".")
    for class_name in reversed(outer):
        tree.body = [ast.ClassDef(class_name, bases=[], keywords=[], body=tree.body, decorator_list=[])]
    local: dict[str, Any] = {}
    flags = _NO_ANNOTATIONS
    code = compile(ast.fix_missing_locations(tree), module.__file__ or "", "exec", flags=flags, dont_inherit=True)
    exec(code, vars(module), local)
    value: Any = local[outer[0] if outer else name]
    for attribute in [*outer[1:], name] if outer else []:
        value = vars(value)[attribute]
    result = _unwrap(value)
    assert result is not None
    return result


def _exchange_constant(module: ModuleType, name: str, mutant: Mutant) -> Any:
    """Assign a constant anew, in every module of d2l that holds it under its name; return what restores it."""
    tree = ast.parse(inspect.getsource(module))
    statements = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in {getattr(it, "id", "") for it in _assigned(node)}
    ]
    if len(statements) != 1:
        raise DoesNotApplyError(f"{mutant.name}: {mutant.symbol} is assigned {len(statements)} times, expected once")
    source = ast.get_source_segment(inspect.getsource(module), statements[0]) or ""
    values: dict[str, Any] = {}
    exec(_replace(source, mutant), vars(module), values)
    old = vars(module)[name]
    holders = [
        other
        for key, other in list(sys.modules.items())
        if key.split(".")[0] == "d2l" and vars(other).get(name, _MARK) is old
    ]
    _assign(holders, name, values[name])
    vars(module)[_MARK].append(1)  # a constant has no code to reach: its witness alone shows that it is used
    return lambda: _assign(holders, name, old)


def _assign(modules: Sequence[ModuleType], name: str, value: Any) -> None:
    for module in modules:
        setattr(module, name, value)
        _clear_caches(module)


def _clear_caches(module: ModuleType) -> None:
    """Forget what the functions of a module remember, which may be of the code before."""
    for value in list(vars(module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]
