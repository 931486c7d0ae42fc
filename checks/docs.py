"""CHECKS.md, `d2l explain` and `d2l checks`, made from the facts of the rules, and a search for what a rule lacks."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from checks.catalogue import CheckFacts, read_catalogue
from checks.result import STAGES
from checks.rule import find_rule
from checks.sources import resolve

SECTIONS = ("What it does", "Why it matters", "How it is detected", "How to fix")
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


def sections(check: CheckFacts) -> dict[str, str]:
    """Split the documentation of a check by headings, which are underlined with `---`: heading -> text."""
    _, *parts = HEADING.split(check.documentation)
    return {heading.strip(): text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def summary(check: CheckFacts) -> str:
    """Return the first line of a check's documentation."""
    return check.documentation.partition("\n")[0]


def problems(checks: Sequence[CheckFacts]) -> list[str]:
    """List what is wrong with the checks as a set and with each one; a test demands an empty list."""
    found: list[str] = []
    seen: set[str] = set()
    if list(checks) != sorted(checks, key=_stage):
        found.append(f"the rules must stand in the order of their stages: {', '.join(STAGES)}")
    for check in checks:
        found += [f"{check.code}: {key} is taken" for key in (check.code, check.name) if key in seen]
        found += [
            f"{check.code}: requires {code}, which does not stand before it"
            for code in check.requires
            if code not in seen
        ]
        seen |= {check.code, check.name}
        found += [f"{check.code}: {problem}" for problem in _own_problems(check)]
    return found


def _own_problems(check: CheckFacts) -> Iterator[str]:
    """Yield what is wrong with one check by itself."""
    if not FORMAT.fullmatch(check.code):
        yield "a code is three capitals and three digits"
    if not KEBAB.fullmatch(check.name):
        yield f"the name {check.name!r} is not kebab-case"
    faults = [fault.name for fault in check.faults]
    if not faults or len(set(faults)) < len(faults):
        yield f"needs at least one planted fault, each with its own name. Got {faults}"
    texts = sections(check)
    if tuple(texts) != SECTIONS:
        yield f"the docstring's sections must be {', '.join(SECTIONS)}. Got {', '.join(texts)}"
    yield from (f"section {heading!r} is empty" for heading, text in texts.items() if not text)
    if summary(check) in ("", *SECTIONS):
        yield "the docstring's first line must state in one sentence what must hold"
    if not check.sources or len(set(check.sources)) < len(check.sources):
        yield f"needs at least one source, each of them once. Got {list(check.sources)}"
    for key in check.sources:
        try:
            resolve(key)
        except (ValueError, OSError) as error:
            yield f"source {key!r}: {error}"


def explain(checks: Sequence[CheckFacts], code_or_name: str) -> str:
    """Return everything about one check as plain text.

    Raises:
        UsageError: there is no such check.
    """
    check = find_rule(checks, code_or_name)
    facts = (f"{label:<9} {text}" for label, text in _facts(check))
    lines = [f"{check.code} {check.name}", summary(check), "", *facts, ""]
    for heading, text in sections(check).items():
        lines += [heading, "-" * len(heading), text, ""]
    lines += ["Sources", "-------"]
    lines += [line for source in map(resolve, check.sources) for line in (source.title, f"  {source.place}")]
    lines += ["", "Planted faults", "--------------"]
    lines += [f"{fault.name}: {fault.description}" for fault in check.faults]
    return "\n".join([*lines, ""])


def as_list(checks: Sequence[CheckFacts]) -> str:
    """Return one line for each check; those of plugins name theirs."""
    width = max((len(check.name) for check in checks), default=0)
    return "\n".join(
        f"{it.code}  {it.stage:<6}  {it.severity:<7}  {it.name:<{width}}  {summary(it)}"
        + (f" ({it.plugin})" if it.plugin else "")
        for it in checks
    )


def as_json(checks: Sequence[CheckFacts]) -> str:
    """Return the facts of every check as a JSON document; a link is an address, or the path of a shipped file."""
    documents = [
        {
            "code": check.code,
            "name": check.name,
            "stage": check.stage,
            "severity": check.severity,
            "sources": [
                {"source": key, "title": source.title, "link": source.place}
                for key, source in zip(check.sources, map(resolve, check.sources), strict=True)
            ],
            "requires": check.requires,
            "faults": [fault.name for fault in check.faults],
            "plugin": check.plugin,
        }
        for check in checks
    ]
    return json.dumps(documents, indent=2, ensure_ascii=False)


def render_markdown(checks: Sequence[CheckFacts]) -> str:
    """Return the text of CHECKS.md: an index for each stage, then one section for each check."""
    lines = [INTRODUCTION]
    for stage, members in groupby(sorted(checks, key=_stage), key=lambda check: check.stage):
        lines += [f"## Stage {stage}", "", "| code | name | severity | what must hold |", "| --- | --- | --- | --- |"]
        lines += [f"| [{c.code}](#{c.code.lower()}) | {c.name} | {c.severity} | {_cell(summary(c))} |" for c in members]
        lines.append("")
    for check in checks:
        lines += [f'<a id="{check.code.lower()}"></a>', "", f"## {check.code} {check.name}", "", summary(check), ""]
        lines += [*(f"- {label}: {text}" for label, text in _facts(check)), ""]
        for heading, text in sections(check).items():
            lines += [f"### {heading}", "", text, ""]
        sources = (f"- [{source.title}]({source.link})" for source in map(resolve, check.sources))
        lines += ["### Sources", "", *sources, ""]
        faults = (f"- `{fault.name}`: {fault.description}" for fault in check.faults)
        lines += ["### Planted faults", "", *faults, ""]
    return "\n".join(lines).rstrip() + "\n"


def _stage(check: CheckFacts) -> int:
    """Return the place of a check's stage among the stages."""
    return STAGES.index(check.stage)


def _facts(check: CheckFacts) -> list[tuple[str, str]]:
    """Return the short facts of a check with their labels."""
    requires = ", ".join(check.requires) or "nothing"
    facts = [("stage", check.stage), ("severity", check.severity), ("requires", requires)]
    return [*facts, ("plugin", check.plugin)] if check.plugin else facts


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write CHECKS.md to standard output, or what the rules lack to standard error."""
    checks = read_catalogue()
    if found := problems(checks):
        sys.exit("\n".join(found))
    sys.stdout.write(render_markdown(checks))


if __name__ == "__main__":
    main()
