"""CHECKS.md, `d2l explain` and `d2l checks`, made from the rules themselves, and what a rule still lacks."""

import inspect
import json
import re
import sys
from collections.abc import Sequence
from itertools import groupby

from checks.result import STAGES
from checks.rule import Rule, find_rule

SECTIONS = ("What it does", "Why it matters", "How it is detected", "How to fix", "Source")
INTRODUCTION = """\
# Checks

Made by `make docs` from the files in `checks/rules`; edit those. `d2l explain CODE` prints one of them, `d2l preflight`
runs them all, and `d2l preflight --selftest` plants every fault below and demands that its check alone turns red.

Stages run in this order: `static` (config, tokenizer, versions; no model), `twin` (a tiny random model derived from the
real config), `data` (the run's own rows, after truncation and packing), `device` (real weights, memory, disk). A check
of severity `error` can fail a run; one of severity `warning` only warns, unless `--fail-level warn`. A check is
*blocked* while one that it requires fails, and *skipped*, with a reason, where it has nothing to look at.
"""
FORMAT = re.compile(r"[A-Z]{3}[0-9]{3}")
KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
HEADING = re.compile(r"^(\S.*)\n-{3,}$", re.MULTILINE)


def sections(rule: Rule) -> dict[str, str]:
    """The documentation of a rule: heading -> text; in the docstring a heading is underlined with `---`."""
    _, *parts = HEADING.split(inspect.cleandoc(rule.documentation))
    return {heading.strip(): text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def summary(rule: Rule) -> str:
    """The first line of a rule's documentation."""
    return inspect.cleandoc(rule.documentation).partition("\n")[0]


def problems(rules: Sequence[Rule]) -> list[str]:
    """What is wrong with the rules as a set and with their documentation; an empty list is what a test demands."""
    found: list[str] = []
    seen: set[str] = set()
    if list(rules) != sorted(rules, key=lambda rule: STAGES.index(rule.stage)):
        found.append(f"the rules must stand in the order of their stages: {', '.join(STAGES)}")
    for rule in rules:
        if not FORMAT.fullmatch(rule.code):
            found.append(f"{rule.code}: a code is three capitals and three digits")
        if not KEBAB.fullmatch(rule.name):
            found.append(f"{rule.code}: the name {rule.name!r} is not kebab-case")
        found += [f"{rule.code}: {key} is taken" for key in (rule.code, rule.name) if key in seen]
        found += [
            f"{rule.code}: requires {code}, which does not stand before it"
            for code in rule.requires
            if code not in seen
        ]
        seen |= {rule.code, rule.name}
        faults = [fault.name for fault in rule.faults]
        if not faults or len(set(faults)) < len(faults):
            found.append(f"{rule.code}: needs at least one planted fault, each with its own name. Got {faults}")
        texts = sections(rule)
        if tuple(texts) != SECTIONS:
            found.append(f"{rule.code}: the docstring's sections must be {', '.join(SECTIONS)}. Got {', '.join(texts)}")
        found += [f"{rule.code}: section {heading!r} is empty" for heading, text in texts.items() if not text]
        if summary(rule) in ("", *SECTIONS):
            found.append(f"{rule.code}: the docstring's first line must say in one sentence what must hold")
    return found


def explain(rules: Sequence[Rule], code_or_name: str) -> str:
    """Everything about one check as plain text.

    Raises:
        UsageError: there is no such check.
    """
    rule = find_rule(rules, code_or_name)
    lines = [f"{rule.code} {rule.name}", summary(rule), "", *(f"{label:<9} {text}" for label, text in _facts(rule)), ""]
    for heading, text in sections(rule).items():
        lines += [heading, "-" * len(heading), text, ""]
    lines += ["Planted faults", "--------------", *(f"{fault.name}: {fault.description}" for fault in rule.faults), ""]
    return "\n".join(lines)


def as_list(rules: Sequence[Rule]) -> str:
    """One line for each check."""
    width = max((len(rule.name) for rule in rules), default=0)
    return "\n".join(f"{r.code}  {r.stage:<6}  {r.severity:<7}  {r.name:<{width}}  {summary(r)}" for r in rules)


def as_json(rules: Sequence[Rule]) -> str:
    """The facts of every check as a JSON document."""
    keys = ("code", "name", "stage", "severity", "source", "requires")
    facts = [{key: getattr(r, key) for key in keys} | {"faults": [fault.name for fault in r.faults]} for r in rules]
    return json.dumps(facts, indent=2, ensure_ascii=False)


def render_markdown(rules: Sequence[Rule]) -> str:
    """The text of CHECKS.md: an index for each stage, then one section for each check."""
    lines = [INTRODUCTION]
    for stage, members in groupby(
        sorted(rules, key=lambda rule: STAGES.index(rule.stage)), key=lambda rule: rule.stage
    ):
        lines += [f"## Stage {stage}", "", "| code | name | severity | what must hold |", "| --- | --- | --- | --- |"]
        lines += [f"| [{r.code}](#{r.code.lower()}) | {r.name} | {r.severity} | {_cell(summary(r))} |" for r in members]
        lines.append("")
    for rule in rules:
        lines += [f'<a id="{rule.code.lower()}"></a>', "", f"## {rule.code} {rule.name}", "", summary(rule), ""]
        lines += [*(f"- {label}: {text}" for label, text in _facts(rule)), ""]
        for heading, text in sections(rule).items():
            lines += [f"### {heading}", "", text, ""]
        lines += ["### Planted faults", "", *(f"- `{fault.name}`: {fault.description}" for fault in rule.faults), ""]
    return "\n".join(lines).rstrip() + "\n"


def _facts(rule: Rule) -> list[tuple[str, str]]:
    facts = [("stage", rule.stage), ("severity", rule.severity), ("source", rule.source)]
    return [*facts, ("requires", ", ".join(rule.requires) or "nothing")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write CHECKS.md to standard output, or what the rules lack to standard error."""
    from checks.rules import RULES

    if found := problems(RULES):
        sys.exit("\n".join(found))
    sys.stdout.write(render_markdown(RULES))


if __name__ == "__main__":
    main()
