"""Packed rows in words: each chunk and question with its place, its positions and its supervised tokens marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from rich.console import Group
from rich.text import Text

from checks.printable import printable
from d2l.evaluation.sample import Part, Sample, Token

TEMPLATE = Path(__file__).with_name("packed_row.html")
OPEN, CLOSE = "[[", "]]"  # around supervised tokens where there is no colour
SUPERVISED = "black on yellow"


@dataclass(frozen=True)
class ShownPart:
    """A chunk or a question as it is shown: a heading, facts in a line, and its tokens."""

    title: str
    facts: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class ShownRow:
    """A packed row as it is shown."""

    title: str
    parts: tuple[ShownPart, ...]


def describe_row(
    number: int, count: int, row: Sample, sources: Sequence[str], *, documents: bool, questions: bool
) -> ShownRow:
    """Describe a packed row that was read whole.

    Args:
        number, count: which packed row it is, from 0, of how many in the epoch.
        sources: where each of its records stands, in the order of `row.records`.
        documents, questions: which sides are shown.
    """
    places = dict(zip(row.records, sources, strict=True))
    tokens, asked = (sum(part.length for part in parts) for parts in (row.chunks, row.questions))
    labels = sum(part.n_labels for part in row.questions)
    title = (
        f"row {number:,} of {count:,}: {row.n_chunks:,} chunks of documents, {tokens:,} tokens; {row.n_questions:,} "
        f"questions, {asked:,} tokens, {labels:,} of them supervised"
    )
    parts = []
    if documents:
        parts += [_part("chunk", index, part, places) for index, part in enumerate(row.chunks)]
    if questions:
        parts += [_part("question", index, part, places) for index, part in enumerate(row.questions)]
    return ShownRow(title, tuple(parts))


def _part(kind: str, index: int, part: Part, places: dict[int, str]) -> ShownPart:
    facts = (
        f"record {part.record} ({printable(places[part.record])}), positions 0 to {part.length - 1:,}, "
        f"tokens {part.start:,} to {part.start + part.length - 1:,} of the row"
    )
    facts += f", {part.n_labels:,} supervised" if kind == "question" else ""
    return ShownPart(f"{kind} {index}", facts, part.tokens)


def plain(rows: Sequence[ShownRow]) -> str:
    """Return rows as plain text; supervised tokens stand in double brackets."""
    lines = [f"supervised tokens stand in {OPEN} {CLOSE}"]
    for row in rows:
        lines += ["", f"=== {row.title}"]
        for part in row.parts:
            lines += ["", f"--- {part.title}: {part.facts}", _bracketed(part.tokens)]
    return "\n".join([*lines, ""])


def _bracketed(tokens: Sequence[Token]) -> str:
    text, inside = "", False
    for token in tokens:
        if token.supervised != inside:
            text += CLOSE if inside else OPEN
            inside = token.supervised
        text += printable(token.text)
    return text + (CLOSE if inside else "")


def coloured(rows: Sequence[ShownRow]) -> Group:
    """Return rows for a terminal; supervised tokens are coloured."""
    lines = [Text.assemble(("supervised tokens", SUPERVISED), " are coloured")]
    for row in rows:
        lines.append(Text(f"\n{row.title}", style="bold"))
        for part in row.parts:
            lines.append(Text(f"\n{part.title}: {part.facts}", style="dim"))
            lines.append(
                Text.assemble(*((printable(it.text), SUPERVISED if it.supervised else "") for it in part.tokens))
            )
    return Group(*lines)


def page(name: str, rows: Sequence[ShownRow]) -> str:
    """Return rows as one HTML page without scripts or outer resources; what comes from data is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["printable"] = printable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(name=printable(name), rows=rows) + "\n"
