"""The commands that make data. Heavy imports come late."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Style = Literal["sentences", "pairs"]
Split = Literal["train", "heldout"]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make documents with questions.")
    data.callback()(_data)  # without it the only command would lose its name
    data.command("needle")(needle)
    app.add_typer(data, name="data")


def _data() -> None:
    """Make documents with questions."""


def needle(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A new JSONL file.")],
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="How many.")] = 64,
    pairs: Annotated[int, typer.Option(metavar="P", min=1, help="Keys with values in a document.")] = 2,
    digits: Annotated[int, typer.Option(metavar="D", min=1, max=4, help="Of a value.")] = 2,
    filler_tokens: Annotated[int, typer.Option(metavar="F", min=0, help="Words of filler in a document.")] = 16,
    style: Annotated[Style, typer.Option(help="English, or the least that a tiny model can read.")] = "sentences",
    split: Annotated[Split, typer.Option(help="They share no pair and no filler.")] = "train",
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Same arguments and seed, same file.")] = 0,
) -> None:
    """Write needle-in-a-haystack documents, each with a question for every needle."""
    from d2l.data.needle import needle_records
    from d2l.data.records import write_records
    from d2l.folders import require_new_file

    require_new_file(output)
    records = needle_records(documents, pairs, digits, filler_tokens, seed, split, style)
    write_records(output, records)
    typer.echo(f"data       {output}\ndocuments  {documents:,}\nquestions  {documents * pairs:,}")
