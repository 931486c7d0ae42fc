"""docs/failure_modes.md, made from the modes in `failure_modes.yaml` and the rules, each of which names those that it sees."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from checks.catalogue import CheckFacts, read_catalogue
from checks.sources import THREAD, resolve

FILE = Path(__file__).with_suffix(".yaml")
SOURCE = "failure mode "  # begins the key of a mode among a rule's sources
CODE = re.compile(r"\b[A-Z]{3}[1-4]\d\d\b")
HEADER = ("mode", "symptom", "cause", "where it can be seen", "right response", "checks", "sources")
SEEN, ELSEWHERE, NONE = "seen by a check", "seen or prevented elsewhere in d2l", "no check, for the reason in its row"
MADE = "Made by `make docs` from `checks/failure_modes.yaml` and from the sources that the checks name; edit those."


class Mode(BaseModel):
    """One way in which a run fails; what each field holds is said at the top of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str = Field(pattern=r"^(F\d|C?\d+)$")
    symptom: str
    cause: str
    seen: str
    response: str
    limits: dict[str, str] = Field(default_factory=dict)
    elsewhere: str = ""
    no_check: str = ""
    sources: tuple[str, ...] = Field(min_length=1)

    @property
    def anchor(self) -> str:
        """Return the name by which the page's row can be reached."""
        return f"failure-mode-{self.mode.lower()}"


class Group(BaseModel):
    """A table of modes, and the text around it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heading: str
    before: str = ""
    after: str = ""
    modes: tuple[Mode, ...]


class Symptom(BaseModel):
    """What a user sees, and the modes that look so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    symptom: str
    modes: tuple[str, ...]


class Modes(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    introduction: str
    reading: str
    symptoms: tuple[Symptom, ...]
    groups: tuple[Group, ...]
    ending: str

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Return the modes of all groups."""
        return tuple(mode for group in self.groups for mode in group.modes)


def read_modes(file: Path = FILE) -> Modes:
    """Read the modes.

    Raises:
        ValidationError: a field is missing, unknown or of the wrong form.
    """
    return Modes.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def checks_of_modes(checks: Sequence[CheckFacts]) -> Mapping[str, tuple[str, ...]]:
    """Return the codes of the checks that name each mode, in the order of running."""
    found: dict[str, tuple[str, ...]] = {}
    for check in checks:
        for mode in (key.removeprefix(SOURCE) for key in check.sources if key.startswith(SOURCE)):
            found[mode] = (*found.get(mode, ()), check.code)
    return found


def problems(modes: Modes, checks: Sequence[CheckFacts]) -> list[str]:
    """List where modes and checks disagree; a test demands an empty list."""
    seeing, names = checks_of_modes(checks), [mode.mode for mode in modes.modes]
    found = [f"mode {name} stands there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    found += [
        f"{', '.join(codes)}: there is no failure mode {name}" for name, codes in seeing.items() if name not in names
    ]
    shown = [(it.symptom, name) for it in modes.symptoms for name in it.modes]
    found += [f"{symptom!r}: there is no failure mode {name}" for symptom, name in shown if name not in names]
    known = {check.code for check in checks}
    texts = yaml.safe_dump(modes.model_dump(mode="json"))
    found += [f"there is no check {code}" for code in sorted({*CODE.findall(texts)} - known)]
    return found + [
        f"mode {it.mode}: {text}" for it in modes.modes for text in _own_problems(it, seeing.get(it.mode, ()))
    ]


def _own_problems(mode: Mode, codes: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with one mode that these checks see."""
    yield from (f"limits {code}, which does not name the mode" for code in mode.limits if code not in codes)
    if (codes or mode.elsewhere) and mode.no_check:
        yield f"{', '.join(codes) or 'another part of d2l'} sees it: remove its no_check"
    if not (codes or mode.elsewhere or mode.no_check):
        yield "no check names it: add its no_check, the reason, or elsewhere, what sees it"


def render_page(modes: Modes, checks: Sequence[CheckFacts]) -> str:
    """Return the text of docs/failure_modes.md."""
    seeing = checks_of_modes(checks)
    lines = [
        "# Failure modes",
        "",
        MADE,
        "",
        modes.introduction,
        *_counts(modes, seeing),
        "",
        modes.reading,
        "## By what you see",
        "",
    ]
    lines += _table(("you see", "look at"), ((it.symptom, ", ".join(map(_link, it.modes))) for it in modes.symptoms))
    for group in modes.groups:
        lines += ["", f"## {group.heading}", "", *([group.before] if group.before else [])]
        lines += _table(HEADER, (_row(mode, seeing.get(mode.mode, ())) for mode in group.modes))
        lines += ["", group.after.strip()] if group.after else []
    return "\n".join([*lines, "", modes.ending.strip(), ""])


def _counts(modes: Modes, seeing: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield a table of how many modes of each group something sees."""
    kinds = (SEEN, ELSEWHERE, NONE)
    rows = []
    for heading, members in [*((it.heading, it.modes) for it in modes.groups), ("all", modes.modes)]:
        found = [SEEN if it.mode in seeing else ELSEWHERE if it.elsewhere else NONE for it in members]
        rows.append((heading, str(len(members)), *(str(found.count(kind)) for kind in kinds)))
    yield from _table(("group", "modes", *kinds), rows)


def _row(mode: Mode, codes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cells of a mode's row."""
    sees = ", ".join(f"{code} ({mode.limits[code]})" if code in mode.limits else code for code in codes)
    checks = "; ".join(text for text in (sees, mode.elsewhere) if text) or f"none: {mode.no_check}"
    sources = "; ".join(_source(text) for text in mode.sources)
    first = f'<a id="{mode.anchor}"></a>{mode.mode}'
    return first, mode.symptom, mode.cause, mode.seen, mode.response, CODE.sub(_check_link, checks), sources


def _source(text: str) -> str:
    """Return a source as Markdown: a thread by the repository's own name and its number."""
    if THREAD.fullmatch(text):
        return f"[{text.partition('/')[2]}]({resolve(text).link})"
    return text


def _check_link(code: re.Match[str]) -> str:
    return f"[{code[0]}](../CHECKS.md#{code[0].lower()})"


def _link(mode: str) -> str:
    return f"[{mode}](#failure-mode-{mode.lower()})"


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        cells = (cell.replace("|", r"\|") for cell in row)
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page to standard output, or where modes and checks disagree to standard error."""
    modes, checks = read_modes(), read_catalogue()
    if found := problems(modes, checks):
        sys.exit("\n".join(found))
    sys.stdout.write(render_page(modes, checks))


if __name__ == "__main__":
    main()
