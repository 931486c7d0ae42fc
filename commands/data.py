"""Commands that make data. Heavy imports are late."""

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
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Write the documents to this new JSONL file.")
    ],
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="Write N documents.")] = 64,
    pairs: Annotated[int, typer.Option(metavar="P", min=1, help="Put P keys with values into each document.")] = 2,
    digits: Annotated[int, typer.Option(metavar="D", min=1, max=4, help="Give each value D decimal digits.")] = 2,
    filler_words: Annotated[
        int, typer.Option(metavar="F", min=0, help="Put F words of filler into each document.")
    ] = 16,
    style: Annotated[Style, typer.Option(help="Write English sentences, or bare pairs for tiny models.")] = "sentences",
    split: Annotated[
        Split, typer.Option(help="Draw from this split; the splits share no pair and no filler.")
    ] = "train",
    seed: Annotated[
        int, typer.Option(metavar="S", min=0, help="Seed of all draws: the same arguments give the same file.")
    ] = 0,
) -> None:
    """Write needle-in-a-haystack documents, each with a question for every needle."""
    from d2l.data.needles import needle_records
    from d2l.data.records import write_records
    from d2l.io.atomic import require_new_file

    require_new_file(output)
    records = needle_records(documents, pairs, digits, filler_words, seed, split, style)
    write_records(output, records)
    _print_counts(output, documents, documents * pairs)


def teacher(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="Configuration (YAML) with the base, chat template and supervision."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Write the records to this new JSONL file.")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Documents with questions; default: the configuration's data."),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=1, help="Keep the K likeliest tokens at every supervised one.")
    ] = 16,
) -> None:
    """Add teacher logprobs to a run's data, from the base with the document in its prompt, for loss: kl."""
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
            written = add_teacher_logprobs(records, base, chat, **options, on_progress=show)
        write_records(output, written)
    _print_counts(output, len(written), sum(len(record.prompts) for record in written))


def _print_counts(output: Path, documents: int, questions: int) -> None:
    typer.echo(f"data       {output}\ndocuments  {documents:,}\nquestions  {questions:,}")
