"""Printing of an evaluation's scores: tables on a terminal, plain lines in columns elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from commands.console import console
from d2l.evaluation.scores import LABELS, SHORT_LABELS, Estimate, Group

if TYPE_CHECKING:
    from d2l.evaluation.run import Evaluation


@dataclass(frozen=True)
class _Table:
    """Table of texts: the first column holds labels, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show_scores(evaluation: "Evaluation") -> None:
    """Print the scores of every condition, and by the size of documents where sizes differ."""
    screen = console()
    tables = [_make_overall_table(evaluation)]
    for name, groups in (("document tokens", evaluation.by_length), ("chunks", evaluation.by_chunks)):
        if len(groups) > 1:
            tables.append(_make_size_table(name, groups))
    if not screen.is_terminal:
        typer.echo("\n\n".join(map(_format_plain, tables)))
        return
    from rich import box
    from rich.table import Table

    for table in tables:
        drawn = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(table.header):
            # fold: no cell is cut off on a narrow terminal
            drawn.add_column(name, justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        screen.print(drawn)


def _make_overall_table(evaluation: "Evaluation") -> _Table:
    """Make the table of all scores of every condition."""
    documents, questions = f"{evaluation.documents:,} documents", f"{evaluation.questions:,} questions"
    rows = [
        (
            LABELS[condition],
            *map(_format_estimate, (score.exact, score.f1, score.rouge_l)),
            *("-" if it is None else f"{it:.3f}" for it in (score.relative_f1, score.relative_rouge_l)),
            f"{score.perplexity.value:.4g}",
            "-" if score.alike is None else f"{score.alike:.2f}",
        )
        for condition, score in evaluation.scores.items()
    ]
    return _Table(
        f"{documents}, {questions}; brackets: 95% confidence intervals; relative: to the document in the prompt; "
        "alike: share of the documents with several expected answers whose questions all got one",
        ("", "exact match", "F1", "ROUGE-L", "relative F1", "relative ROUGE-L", "perplexity", "alike"),
        tuple(rows),
    )


def _make_size_table(name: str, groups: Sequence[Group]) -> _Table:
    """Make the table of exact match and F1 for each group of documents."""
    rows = [
        (
            f"{group.low:,}" if group.low == group.high else f"{group.low:,}-{group.high:,}",
            f"{group.documents:,}",
            f"{group.questions:,}",
            *(f"{score.exact.value:.3f} / {score.f1.value:.3f}" for score in group.scores.values()),
        )
        for group in groups
    ]
    conditions = [SHORT_LABELS[condition] for condition in groups[0].scores]
    return _Table(f"exact match / F1 by {name}", (name, "documents", "questions", *conditions), tuple(rows))


def _format_estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _format_plain(table: _Table) -> str:
    """Format a table as plain text, its columns as wide as their widest cell."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([table.title, *text])
