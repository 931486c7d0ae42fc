"""Commands that make and show data. Heavy imports are late."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from checks.result import UsageError
from commands.console import (
    DataOption,
    ModelOption,
    SetOption,
    TokenizerOption,
    console,
    libraries_to_stderr,
    progress,
    read_config,
)

if TYPE_CHECKING:
    from commands.packed_rows import ShownRow
    from d2l.build import Components
    from d2l.config.schema import RunConfig

Style = Literal["sentences", "pairs"]
Split = Literal["train", "heldout"]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    data = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="Make documents with questions, and show packed rows."
    )
    data.command("needle")(needle)
    data.command("teacher")(teacher)
    data.command("show")(show)
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
    """Add teacher logprobs to a run's data, from the base with the document in its prompt, for loss: kl.

    What is done when it is interrupted is kept in FILE.parts: the same command goes on from there.
    """
    from d2l.config.load import load_config
    from d2l.io.atomic import require_new_file

    require_new_file(output)
    resolved = load_config(config, model=model, tokenizer=tokenizer, data=data)
    with libraries_to_stderr():
        from d2l.build import Components
        from d2l.train.taught import write_taught
        from d2l.train.teacher import add_teacher_logprobs, require_teachable

        components = Components(resolved)
        records, chat = components.records, components.chat
        with progress("documents tokenized") as show:
            require_teachable(records, components.base_config, chat, top_k, show)
        teach = partial(
            add_teacher_logprobs,
            base=components.base,
            chat=chat,
            top_k=top_k,
            packed_tokens=resolved.max_packed_inp_len,
        )
        with progress("documents") as show:
            kept = write_taught(output, records, teach, _made_by(components, top_k), show)
    if kept:
        typer.echo(f"Note: {kept:,} of {len(records):,} documents were done by an earlier call", err=True)
    _print_counts(output, len(records), sum(len(record.prompts) for record in records))


def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML) of the run.")],
    data: DataOption = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    settings: SetOption = None,
    rows: Annotated[
        list[int] | None,
        typer.Option("--row", metavar="N", min=0, help="Show packed row N, counted from 0; repeatable. Default: 0."),
    ] = None,
    epoch: Annotated[int, typer.Option(metavar="E", min=0, help="Take the rows of epoch E, counted from 0.")] = 0,
    context: Annotated[bool, typer.Option("--context", help="Show the documents alone.")] = False,
    questions: Annotated[bool, typer.Option("--input", help="Show the questions with their answers alone.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page to this new file instead.")
    ] = None,
) -> None:
    """Show packed rows as the run would train on them: every token, borders, positions, and what is supervised.

    With a curriculum, the rows of its first stage are counted.
    """
    from d2l.io.atomic import require_new_file, write_new_file

    if html is not None:
        require_new_file(html)
    resolved = read_config(config, settings or (), model=model, tokenizer=tokenizer, data=data)
    numbers = list(dict.fromkeys(rows or [0]))
    shown = _packed_rows(
        resolved, numbers, epoch, documents=context or not questions, questions=questions or not context
    )
    from commands import packed_rows

    if html is not None:
        with write_new_file(html) as partial:
            partial.write_text(packed_rows.page(str(config), shown), encoding="utf-8")
        typer.echo(f"page  {html}")
        return
    screen = console()
    if screen.is_terminal and not screen.is_dumb_terminal:
        screen.print(packed_rows.coloured(shown))
    else:
        typer.echo(packed_rows.plain(shown), nl=False)


def _packed_rows(
    config: "RunConfig", numbers: list[int], epoch: int, *, documents: bool, questions: bool
) -> "list[ShownRow]":
    """Tokenize and pack the run's data, and describe some of its packed rows."""
    with libraries_to_stderr(), progress("records") as on_tokenize:
        from commands.packed_rows import describe_row
        from d2l.build import Components
        from d2l.data.epochs import epoch_batches, stage_rows
        from d2l.evaluation.sample import read_batch

        components = Components(config, on_tokenize)
        first_stage = stage_rows(config, components.rows)[0]
        batches = epoch_batches(config, components.rows, epoch, first_stage)
        if beyond := [number for number in numbers if number >= len(batches)]:
            raise UsageError(f"--row {beyond[0]}: epoch {epoch} has the packed rows 0 to {len(batches) - 1:,}")
        shown = []
        for number in numbers:
            batch = batches[number]
            sources = [components.records[record].source for record in batch.record_ids]
            row = read_batch(components.chat, batch, whole=True)
            sides = {"documents": documents, "questions": questions}
            shown.append(describe_row(number, len(batches), row, sources, **sides))
        return shown


def _made_by(components: "Components", top_k: int) -> dict[str, str]:
    """Return what decides a teacher's values, by name."""
    from d2l.fingerprint import run_fingerprint

    config = components.config
    parts = run_fingerprint(config, components.base_config, components.chat, components.records, {}).parts
    settings = {"model": config.model_name_or_path, "seed": str(config.seed), "top_k": str(top_k)}
    return settings | {name: parts[name] for name in ("base_config", "tokenizer", "chat", "data")}


def _print_counts(output: Path, documents: int, questions: int) -> None:
    typer.echo(f"data       {output}\ndocuments  {documents:,}\nquestions  {questions:,}")
