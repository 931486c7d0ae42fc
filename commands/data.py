"""The commands that make data. Heavy imports come late."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.console import ModelOption, TokenizerOption, libraries_to_stderr, progress

Style = Literal["sentences", "pairs"]
Split = Literal["train", "heldout"]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make documents with questions.")
    data.command("needle")(needle)
    data.command("teacher")(teacher)
    app.add_typer(data, name="data")


def needle(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A new JSONL file.")],
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="How many.")] = 64,
    pairs: Annotated[int, typer.Option(metavar="P", min=1, help="Keys with values in a document.")] = 2,
    digits: Annotated[int, typer.Option(metavar="D", min=1, max=4, help="Of a value.")] = 2,
    filler_words: Annotated[int, typer.Option(metavar="F", min=0, help="Words of filler in a document.")] = 16,
    style: Annotated[Style, typer.Option(help="English, or the least that a tiny model can read.")] = "sentences",
    split: Annotated[Split, typer.Option(help="They share no pair and no filler.")] = "train",
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Same arguments and seed, same file.")] = 0,
) -> None:
    """Write needle-in-a-haystack documents, each with a question for every needle."""
    from d2l.data.needles import needle_records
    from d2l.data.records import write_records
    from d2l.io.atomic import require_new_file

    require_new_file(output)
    records = needle_records(documents, pairs, digits, filler_words, seed, split, style)
    write_records(output, records)
    typer.echo(f"data       {output}\ndocuments  {documents:,}\nquestions  {documents * pairs:,}")


def teacher(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: its base, chat template and supervision.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A new JSONL file.")],
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Default: the config's data.")] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    top_k: Annotated[int, typer.Option(metavar="K", min=1, help="Likeliest tokens that are kept.")] = 16,
) -> None:
    """Write a run's data with what the base answers when it has the document in its prompt, for loss: kl."""
    from d2l.config.load import load_config
    from d2l.io.atomic import require_new_file

    require_new_file(output)
    resolved = load_config(config, model=model, tokenizer=tokenizer, data=data)
    with libraries_to_stderr():
        from d2l.build import Components
        from d2l.data.records import write_records
        from d2l.train.teacher import add_teacher_logprobs

        components = Components(resolved)
        records, chat, base = components.records, components.chat, components.base
        with progress("passes") as show:
            options = {"top_k": top_k, "packed_tokens": resolved.max_packed_inp_len}
            taught = add_teacher_logprobs(records, base, chat, **options, on_progress=show)
        write_records(output, taught)
    typer.echo(f"data       {output}\ndocuments  {len(taught):,}\nquestions  {sum(len(it.prompts) for it in taught):,}")
