"""Checks of other distributions: found by their entry points, held to what ours are held to, and named as theirs."""

import inspect
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from checks.catalogue import CheckFacts, facts_of, read_catalogue
from checks.docs import problems
from checks.result import SEVERITIES, STAGES
from checks.rule import Fault, Rule
from checks.seal import hash_sources

GROUP = "d2l.checks"
Staged = TypeVar("Staged", Rule, CheckFacts)


@dataclass(frozen=True)
class Plugin:
    """What an entry point of the group `d2l.checks` brought.

    Args:
        name: distribution and version, such as `example-checks 1.0`.
        entry: the entry point as it is written: `NAME = MODULE:ATTRIBUTE`.
        code: sha256 of the sources of its package; empty where it could not be imported.
        rules: its checks; none where it is refused.
        problems: why it is refused.
    """

    name: str
    entry: str
    code: str = ""
    rules: tuple[Rule, ...] = ()
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return its name and the beginning of its code's hash: another code is another plugin."""
        return f"{self.name} (code {self.code[:12]})" if self.code else f"{self.name} (not imported)"


@cache
def load_plugins() -> tuple[Plugin, ...]:
    """Import what installed distributions register, in the order of their names; nothing that they do is raised."""
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: (_distribution(entry), entry.name))
    known = [*read_catalogue()] if entries else []
    plugins: list[Plugin] = []
    for entry in entries:
        plugins.append(plugin := _load(entry, known))
        known = in_order([*known, *map(facts_of, plugin.rules)])
    return tuple(plugins)


def with_plugins(own: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return our rules and those of plugins, which stand behind ours of their stage."""
    return tuple(in_order([*own, *(rule for plugin in load_plugins() for rule in plugin.rules)]))


def full_catalogue() -> tuple[CheckFacts, ...]:
    """Return the facts of our checks and of those of plugins."""
    return tuple(in_order([*read_catalogue(), *plugin_facts()]))


def plugin_facts() -> tuple[CheckFacts, ...]:
    """Return the facts of the checks of plugins."""
    return tuple(facts_of(rule) for plugin in load_plugins() for rule in plugin.rules)


def in_order(checks: Iterable[Staged]) -> list[Staged]:
    """Return checks in the order of their stages."""
    return sorted(checks, key=lambda check: STAGES.index(check.stage))


def package_files(module: str) -> list[Path]:
    """Return the source files of the package, or single file, that an imported module belongs to."""
    top = sys.modules[module.partition(".")[0]]
    if folders := getattr(top, "__path__", None):
        return [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    file = getattr(top, "__file__", None)
    return [Path(file)] if file else []


def _distribution(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a distribution without a name"


def _load(entry: metadata.EntryPoint, known: Sequence[CheckFacts]) -> Plugin:
    """Import one entry point and judge what it registers.

    Args:
        known: the checks whose codes and names are taken, and which its own may require.
    """
    plugin = Plugin(_distribution(entry), f"{entry.name} = {entry.value}")
    try:
        with redirect_stdout(sys.stderr):  # stdout is for reports
            given = entry.load()
            rules = (given,) if isinstance(given, Rule) else tuple(given)
        files = package_files(entry.module)
        if not files:
            return replace(plugin, problems=("its source files are not found: a report could not say what judged",))
        plugin = replace(plugin, code=hash_sources(files, files[0].parent))
        found = _problems(rules, known)
    except (Exception, SystemExit) as error:  # whatever a stranger's code does, the other checks run
        found = [f"{type(error).__name__}: {error}"]
    if found:
        return replace(plugin, problems=tuple(found))
    return replace(plugin, rules=tuple(replace(rule, plugin=plugin.name) for rule in rules))


def _problems(rules: Sequence[Any], known: Sequence[CheckFacts]) -> list[str]:
    """Return what a plugin's checks lack: first their form, then whose codes they take, then what ours must have too."""
    if not rules:
        return ["it registers no check: expected a Rule of checks.rule, or several in a tuple"]
    if found := [problem for rule in rules for problem in _malformed(rule)]:
        return found
    owners = {key: check.plugin or "d2l" for check in known for key in (check.code, check.name)}
    if found := [
        f"{rule.code}: {key} is taken by {owners[key]}"
        for rule in rules
        for key in (rule.code, rule.name)
        if key in owners
    ]:
        return found
    return problems(in_order([*known, *map(facts_of, rules)]))


def _malformed(rule: Any) -> list[str]:
    """Return what is not of the form that the runner counts on."""
    if not isinstance(rule, Rule):
        return [f"expected a Rule of checks.rule. Got {type(rule).__name__}"]
    texts = {"code": (rule.code,), "name": (rule.name,), "sources": rule.sources, "requires": rule.requires}
    found = [
        f"{key} must be text"
        if key in ("code", "name")
        else f"{key} must be a tuple of texts. Got {getattr(rule, key)!r}"
        for key, values in texts.items()
        if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values)
    ]
    if rule.stage not in STAGES:
        found.append(f"there is no stage {rule.stage!r}: expected one of {', '.join(STAGES)}")
    if rule.severity not in SEVERITIES:
        found.append(f"there is no severity {rule.severity!r}: expected one of {', '.join(SEVERITIES)}")
    if not inspect.isfunction(rule.check):
        found.append("check must be a function, whose module's docstring is the documentation")
    if not isinstance(rule.faults, tuple) or not all(_is_fault(fault) for fault in rule.faults):
        found.append("faults must be a tuple of Fault(name, description, plant)")
    return [f"{rule.code}: {problem}" for problem in found]


def _is_fault(fault: Any) -> bool:
    return isinstance(fault, Fault) and isinstance(fault.name, str) and callable(fault.plant)
