"""An evaluation's scores on stdout: tables on a terminal, plain lines in columns elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from d2l.evaluation.run import Evaluation
    from d2l.evaluation.scores import Condition, Estimate, Group

LABELS: "dict[Condition, str]" = {
    "document": "the document's LoRA",
    "other": "another document's LoRA",
    "none": "no document",
    "in_prompt": "document in the prompt",
}
SHORT: "dict[Condition, str]" = {"document": "LoRA", "other": "other LoRA", "none": "none", "in_prompt": "in prompt"}


@dataclass(frozen=True)
class _Table:
    """What is shown: the first column holds labels, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show_scores(evaluation: "Evaluation") -> None:
    """Print the scores of every condition, and by the size of documents where sizes differ."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    shown = [_overall(evaluation)]
    for name, groups in (("document tokens", evaluation.by_length), ("chunks", evaluation.by_chunks)):
        if len(groups) > 1:
            shown.append(_by_size(name, groups))
    if not console.is_terminal:
        typer.echo("\n\n".join(map(_plain, shown)))
        return
    from rich import box
    from rich.table import Table

    for table in shown:
        drawn = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(table.header):
            drawn.add_column(name, justify="right" if place else "left", overflow="fold")  # narrow: nothing is cut off
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def _overall(evaluation: "Evaluation") -> _Table:
    documents, questions = f"{evaluation.documents:,} documents", f"{evaluation.questions:,} questions"
    rows = [
        (
            LABELS[condition],
            *map(_with_interval, (score.exact, score.f1, score.rouge_l)),
            *("-" if it is None else f"{it:.3f}" for it in (score.relative_f1, score.relative_rouge_l)),
            f"{score.perplexity.value:.4g}",
        )
        for condition, score in evaluation.scores.items()
    ]
    return _Table(
        f"{documents}, {questions}; brackets: 95% confidence intervals; relative: to the document in the prompt",
        ("", "exact match", "F1", "ROUGE-L", "relative F1", "relative ROUGE-L", "perplexity"),
        tuple(rows),
    )


def _by_size(name: str, groups: "Sequence[Group]") -> _Table:
    rows = [
        (
            f"{group.low:,}" if group.low == group.high else f"{group.low:,}-{group.high:,}",
            f"{group.documents:,}",
            f"{group.questions:,}",
            *(f"{score.exact.value:.3f} / {score.f1.value:.3f}" for score in group.scores.values()),
        )
        for group in groups
    ]
    conditions = [SHORT[condition] for condition in groups[0].scores]
    return _Table(f"exact match / F1 by {name}", (name, "documents", "questions", *conditions), tuple(rows))


def _with_interval(estimate: "Estimate") -> str:
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _plain(table: _Table) -> str:
    """Columns as wide as what stands in them."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([table.title, *text])
