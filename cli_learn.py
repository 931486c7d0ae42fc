"""The commands about learning: pretrain a tiny base that can read, evaluate a checkpoint. Heavy imports come late."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2l.errors import DataError

if TYPE_CHECKING:
    from d2l.evaluate import Evaluation

LABELS = {
    "document": "the document's LoRA",
    "other": "another document's LoRA",
    "none": "no document",
    "in_prompt": "document in the prompt",
}


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    commands: tuple[tuple[str, Callable[..., None]], ...] = (("eval", evaluate), ("pretrain-tiny", pretrain_tiny))
    for name, command in commands:
        app.command(name)(command)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step folder, or a run's folder.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="JSONL, Parquet or a dataset folder.")],
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=2, help="At most N documents.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the other documents and the intervals.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="A new JSON file.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Where the base lies now.")] = None,
) -> None:
    """Answer questions with a document's LoRA, another's, none, and in the prompt."""
    if output is not None and output.exists():
        raise DataError(f"{output} exists and is never written over: remove it or give -o another name")
    with redirect_stdout(sys.stderr):  # what libraries print meanwhile; stdout is for the table
        from d2l.data.records import read_records
        from d2l.evaluate import evaluate as ask_everything
        from d2l.trained import load_trained

        records = read_records([data], limit)
        result = ask_everything(load_trained(checkpoint, model), records, seed=seed, max_new_tokens=max_new_tokens)
    if output is not None:
        try:
            with output.open("x", encoding="utf-8") as file:
                json.dump(result.record(), file, ensure_ascii=False, indent=1)
        except OSError as error:
            raise DataError(f"cannot write {output}: {error.strerror}; give -o another name") from None
    typer.echo(table(result))


def pretrain_tiny(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder.")],
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of weights and data.")] = 0,
    max_steps: Annotated[int, typer.Option("--max-steps", metavar="N", min=1, help="Give up after N steps.")] = 3000,
) -> None:
    """Train a tiny GPT-OSS that answers questions on a document in its prompt."""
    from d2l.folders import require_absent

    require_absent(output)
    with redirect_stdout(sys.stderr):
        from d2l.pretrain import PASSING, pretrain, save_reader

    reached = None
    for reached in pretrain(seed, max_steps):
        _, at = reached
        typer.echo(f"step {at.step:>5}  loss {at.loss:.3f}  held-out exact match {at.accuracy:.3f}")
    assert reached is not None, "the last step is always measured"
    model, progress = reached
    save_reader(model, output)
    typer.echo(f"model  {output}")
    if progress.accuracy < PASSING:
        typer.echo(f"It stayed below {PASSING}: give it more --max-steps or another --seed.", err=True)
        raise typer.Exit(1)


def table(evaluation: "Evaluation") -> str:
    """The scores as text, a line for each condition."""
    lines = [
        f"{evaluation.documents:,} documents, {evaluation.questions:,} questions; brackets: 95% confidence intervals",
        f"{'':<24}{'exact match':>20}{'F1':>20}{'relative F1':>13}{'perplexity':>12}",
    ]
    for condition, score in evaluation.scores.items():
        relative = "" if score.relative_f1 is None else f"{score.relative_f1:.3f}"
        spans = [f"{it.value:.3f} [{it.low:.2f}, {it.high:.2f}]" for it in (score.exact, score.f1)]
        lines.append(
            f"{LABELS[condition]:<24}{spans[0]:>20}{spans[1]:>20}{relative:>13}{score.perplexity.value:>12.4g}"
        )
    return "\n".join(lines)
