"""How a report is laid out: as plain lines, or as coloured tables on a terminal, in the same words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

STYLES = {
    "pass": "green",
    "warn": "yellow",
    "fail": "bold red",
    "skip": "yellow",
    "inapplicable": "dim",
    "blocked": "dim",
    "crash": "bold magenta",
    "caught": "green",
    "missed": "bold red",
    "not_applied": "bold yellow",
}
QUIET = {"pass", "skip", "inapplicable", "blocked", "caught"}  # written small; everything else is in capitals
SHORT = {"inapplicable": "n/a"}
WIDE = 100  # columns from which the table has room for the seconds


@dataclass(frozen=True)
class Line:
    """One line of a table: what became of one check or one planted fault."""

    section: str
    kind: str
    code: str
    name: str
    message: str
    seconds: float

    @property
    def word(self) -> str:
        """Return the outcome as it is written: findings in capitals."""
        word = SHORT.get(self.kind, self.kind.replace("_", " "))
        return word if self.kind in QUIET else word.upper()


@dataclass(frozen=True)
class Block:
    """A part below the table: a heading and labelled rows; a row's text may have several lines."""

    heading: str
    style: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """A whole report: what was judged, a line for each check, the blocks below them, and the verdict."""

    title: str
    judged: Sequence[tuple[str, str]]
    lines: Sequence[Line]
    blocks: Sequence[Block]
    summary: str
    good: bool


def plain(page: Page) -> str:
    """Return the page as lines, without colour or boxes."""
    width = max((len(line.name) for line in page.lines), default=0)
    words = max((len(line.word) for line in page.lines), default=0)
    margin = max((len(what) for what, _ in page.judged), default=0)
    text = [page.title, *(f"  {what:<{margin}}  {value}" for what, value in page.judged)]
    if page.lines:
        text.append("")
    for line in page.lines:
        text.append(f"{line.code} {line.name:<{width}}  {line.word:<{words}}  {' '.join(line.message.split())}")
    for block in page.blocks:
        text += ["", block.heading]
        margin = max(len(label) for label, _ in block.rows)
        for label, value in block.rows:
            first, *rest = value.splitlines() or [""]
            text.append(f"  {label:<{margin}}  {first}" if margin else f"  {first}")
            text += [" " * (margin + 4 if margin else 4) + line for line in rest]
    return "\n".join([*text, "", page.summary, ""])


def coloured(page: Page, width: int) -> RenderableType:
    """Return the page as coloured tables for a terminal of so many columns."""
    parts: list[RenderableType] = [Text(page.title, style="bold")]
    if page.judged:
        parts.append(Padding(_rows(Block("", "", page.judged)), (0, 0, 0, 2)))
    names = max((len(line.name) for line in page.lines), default=0)
    words = max((len(line.word) for line in page.lines), default=0)
    for section, lines in groupby(page.lines, key=lambda line: line.section):
        parts += [Text(f"\n{section}", style="bold"), _table(lines, words, names, wide=width >= WIDE)]
    for block in page.blocks:
        parts += [Text(f"\n{block.heading}", style=block.style), Padding(_rows(block), (0, 0, 0, 2))]
    return Group(*parts, Text(f"\n{page.summary}", style="bold green" if page.good else "bold red"))


def _table(lines: Iterable[Line], words: int, names: int, *, wide: bool) -> Table:
    """Make a table of one line for each check, cut at the edge: findings stand whole below it."""
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=words + 2, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(width=names, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    if wide:
        table.add_column(width=7, justify="right", no_wrap=True, style="dim")
    for line in lines:
        dim = "dim" if line.kind in ("skip", "inapplicable", "blocked") else ""
        cells = [
            Text(f"  {line.word}", style=STYLES[line.kind]),
            Text(line.code, style=dim),
            Text(line.name, style=dim),
            Text(" ".join(line.message.split()), style=dim),
        ]
        table.add_row(*cells, *([Text(f"{line.seconds:.1f} s" if line.seconds >= 0.05 else "")] if wide else []))
    return table


def _rows(block: Block) -> Table:
    labelled = any(label for label, _ in block.rows)
    rows = Table.grid(padding=(0, 2, 0, 0))
    if labelled:
        rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for label, value in block.rows:
        rows.add_row(*([Text(label)] if labelled else []), Text(value))
    return rows
