"""`d2l internalize`: documents as adapters that servers take. Heavy imports are late."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checks.result import UsageError
from commands.console import BaseOption, CheckpointArgument, console, libraries_to_stderr, read_checkpoint
from commands.documents import STDIN, read_document
from d2l.errors import DataError
from d2l.inference.cards import Index, open_index, require_place_for_many, require_place_for_one
from d2l.inference.documents import Document, count_documents, is_single, merge, read_documents
from d2l.inference.servers import MAX_ERROR, AdapterDtype, AdapterForm, Server, request_command, serve_command

if TYPE_CHECKING:
    from d2l.inference.batch import Internalizer, Outcome
    from d2l.inference.load import TrainedModel

INCOMPLETE = 14  # exit code: some of several documents have no adapter
SHOWN = 10  # failed documents in the summary; the index has all
LINE_EVERY = 5.0  # seconds between lines of progress where there is no terminal

ShowDocument = Callable[[int, str], None]
ShowChunks = Callable[[int, int], None]

DocumentsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DOCUMENT...",
        help='Documents: text files, folders of them, JSONL of {"context": "...", "id": "..."}, or - for stdin.',
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(internalize)


def internalize(
    checkpoint: CheckpointArgument,
    documents: DocumentsArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Write here: one document's adapter, or a folder for each of several."
        ),
    ],
    model: BaseOption = None,
    merged: Annotated[
        bool, typer.Option("--merge", help="One adapter of all documents: ranks side by side, the learned bias once.")
    ] = False,
    server: Annotated[Server, typer.Option("--for", help="Write what this server takes.")] = "peft",
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", min=1, help="Rank of the adapters: by zeros, or by exact refactoring."),
    ] = None,
    dtype: Annotated[AdapterDtype, typer.Option("--dtype", help="Number format of the adapters.")] = "float32",
    max_error: Annotated[
        float,
        typer.Option("--max-error", metavar="E", min=0.0, help="Refuse a rank that moves a delta by more, relatively."),
    ] = MAX_ERROR,
    pack: Annotated[
        int | None,
        typer.Option(
            "--pack",
            metavar="TOKENS",
            min=1,
            help="Read chunks together, up to so many tokens: faster, and no longer equal to the last bit.",
        ),
    ] = None,
) -> None:
    """Turn documents into PEFT adapters.

    What is there and still right is kept, and of a changed document only the changed chunks are read.
    """
    try:
        form = AdapterForm(server, rank, dtype, max_error)
    except ValueError as error:
        raise UsageError(f"--rank {rank}: {error}") from None
    if merged:
        _refuse_what_mixes(documents, output)
        _internalize_one(checkpoint, merge(read_documents(documents), output.name), output, model, form, pack)
    elif is_single(documents):
        _internalize_one(checkpoint, _read_one(documents[0], output), output, model, form, pack)
    else:
        _internalize_many(checkpoint, documents, output, model, form, pack)


def _read_one(place: str, output: Path) -> Document:
    """Read a document, whose id is the name of its adapter's folder."""
    return Document(output.name, "stdin" if place == STDIN else Path(place).name, place, read_document(place))


def _internalize_one(
    checkpoint: Path, document: Document, output: Path, model: str | None, form: AdapterForm, pack: int | None
) -> None:
    """Write the adapter of one document, or of a merged one, to a folder of its own, or bring it up to date."""
    require_place_for_one(output, document)
    with libraries_to_stderr():
        from d2l.inference.batch import Internalizer

        trained = read_checkpoint(checkpoint, model)
        with _progress(1) as (_, show_chunks):
            work = Internalizer(trained, form, lambda _: output, pack, show_chunks)
            (outcome,) = work.run([document])
        if outcome.card is None:
            raise DataError(outcome.reason if document.parts else f"{document.source}: {outcome.reason}")
    card = outcome.card
    lines = [f"adapter  {output}", f"rank     {card.rank}, on {', '.join(_modules(trained))} of every layer"]
    lines += [f"merged   {part['name']}, {part['chunks']:,} chunks" for part in card.parts]
    lines += [f"base     {card.base}"]
    lines += [f"work     {_work([outcome])}"]
    if card.is_refactored:
        lines += [f"error    {card.error:.2g} of a delta, by rank {card.rank} in place of {card.generated_rank}"]
    lines += [f"use      PeftModel.from_pretrained(base, {str(output)!r})"]
    _warn([outcome])
    typer.echo("\n".join([*lines, *_serving(form, trained, output.resolve().parent, [outcome])]))


def _internalize_many(
    checkpoint: Path, places: list[str], output: Path, model: str | None, form: AdapterForm, pack: int | None
) -> None:
    """Write an adapter folder for each document, and an index of all."""
    require_place_for_many(output)
    _refuse_what_mixes(places, output)
    total = count_documents(places)
    if total == 0:
        raise DataError(f"{', '.join(places)}: holds no document")
    with libraries_to_stderr():
        from d2l.inference.batch import Internalizer

        trained = read_checkpoint(checkpoint, model)
        with _progress(total) as (show_document, show_chunks):
            work = Internalizer(trained, form, lambda id_: output / id_, pack, show_chunks)
            with open_index(output) as index:
                index.require_checkpoint(work.checkpoint["sha256"])
                outcomes = _run(work, index, read_documents(places, index.known), show_document)
                others = index.entries.keys() - {outcome.document.id for outcome in outcomes}
    _warn(outcomes)
    _print_summary(form, trained, output, outcomes, sorted(id_ for id_ in others if (output / id_).is_dir()))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(INCOMPLETE)


def _run(
    work: "Internalizer", index: Index, documents: Iterable[Document], show_document: ShowDocument
) -> "list[Outcome]":
    """Work through the documents, each one's line of the index written when it is done; texts are not kept."""
    outcomes = []
    for number, outcome in enumerate(work.run(documents), 1):
        index.add(outcome.entry(work.checkpoint["sha256"]))
        show_document(number, f"{outcome.document.id} {outcome.status}")
        outcomes.append(outcome.without_text())
    return outcomes


def _refuse_what_mixes(places: Sequence[str], output: Path) -> None:
    """Refuse stdin among several documents, and an output inside a folder of documents."""
    if STDIN in places:
        raise UsageError("- is one document and goes with no other: write it to a file")
    for place in map(Path, places):
        if place.is_dir() and output.resolve().is_relative_to(place.resolve()):
            raise UsageError(f"{output} is inside {place}, whose files are the documents: choose a folder outside")


def _warn(outcomes: "Sequence[Outcome]") -> None:
    """Say on stderr in which way documents are unlike those of the training."""
    warned = [
        (outcome.document.id, warning) for outcome in outcomes if outcome.card for warning in outcome.card.warnings
    ]
    for id_, warning in warned[:SHOWN]:
        typer.echo(f"Note: {id_}: {warning}", err=True)
    if len(warned) > SHOWN:
        typer.echo(f"Note: and {len(warned) - SHOWN:,} more; the index has all", err=True)


def _print_summary(
    form: AdapterForm,
    trained: "TrainedModel",
    output: Path,
    outcomes: "Sequence[Outcome]",
    others: Sequence[str],
) -> None:
    """Print what became of the documents, and which adapters lie beside those.

    Args:
        others: ids of documents of earlier calls.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    made = [outcome for outcome in outcomes if outcome.card is not None]
    failed = [outcome for outcome in outcomes if outcome.card is None]
    duplicates = [outcome for outcome in made if outcome.duplicate_of]
    errors = [outcome.card.error for outcome in made if outcome.card and outcome.card.is_refactored]
    lines = [f"folder   {output}, with index.jsonl"]
    lines += [f"adapters {counts['made']:,} made, {counts['kept']:,} kept, {counts['failed']:,} failed"]
    lines += [f"work     {_work(outcomes)}"]
    if made:
        ranks = [outcome.card.rank for outcome in made if outcome.card]
        lines += [f"rank     up to {max(ranks)}, on {', '.join(_modules(trained))} of every layer"]
    if errors:
        lines += [f"error    up to {max(errors):.2g} of a delta, in {len(errors):,} adapters of a smaller rank"]
    lines += [f"base     {trained.config.model_name_or_path}"]
    if others:
        lines += [
            f"beside   adapters of documents that were not among these: {_some(others)}; remove what is not wanted"
        ]
    lines += _listing("same as", [f"{it.document.id} {it.duplicate_of}" for it in duplicates])
    lines += _listing("failed ", [f"{it.document.source}: {it.reason.splitlines()[0]}" for it in failed])
    typer.echo("\n".join([*lines, *_serving(form, trained, output, made)]))


def _listing(title: str, items: Sequence[str]) -> list[str]:
    rest = [f"and {len(items) - SHOWN:,} more in index.jsonl"] if len(items) > SHOWN else []
    return [f"{title}  {item}" for item in [*items[:SHOWN], *rest]]


def _some(names: Sequence[str]) -> str:
    """Name the first, and count the rest."""
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _work(outcomes: "Sequence[Outcome]") -> str:
    """Describe how many chunks went through the base, and which share of the work was saved."""
    kept = sum(outcome.card.chunks["used"] or 0 for outcome in outcomes if outcome.card and outcome.status == "kept")
    read, reused = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("read", "reused"))
    total = read + reused + kept
    return f"{read:,} of {total:,} chunks read, {(reused + kept) / max(1, total):.0%} saved"


def _modules(trained: "TrainedModel") -> Sequence[str]:
    return trained.config.target_modules


def _serving(form: AdapterForm, trained: "TrainedModel", folder: Path, made: "Sequence[Outcome]") -> list[str]:
    """Return the lines that say how to serve the adapters and to ask one."""
    if not made:
        return []
    base, modules, ids = trained.config.model_name_or_path, _modules(trained), [outcome.document.id for outcome in made]
    rank = max(outcome.card.rank for outcome in made if outcome.card)
    command = serve_command(form.server, base, folder, ids, rank, modules)
    if command is None:
        return [f"serve    vLLM takes no adapter of rank {rank}: --for vllm"]
    return [f"serve    {command}", f"ask      {request_command(form.server, base, ids[0])}"]


@contextmanager
def _progress(total: int) -> Iterator[tuple[ShowDocument, ShowChunks]]:
    """Yield what shows documents done, and chunks read of those being read: bars on a terminal, else lines for several."""
    screen = console(stderr=True)
    if screen.is_terminal and not screen.is_dumb_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=screen, transient=True) as bar:
            documents = bar.add_task("documents", total=total)
            chunks = bar.add_task("chunks", total=None)
            yield (
                lambda number, text: bar.update(documents, completed=number),
                lambda done, of: bar.update(chunks, completed=done, total=of),
            )
        return
    last = time.monotonic()

    def show_document(number: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_EVERY or number == total:
            last = time.monotonic()
            screen.out(f"document {number:,}/{total:,}  {text}", highlight=False)

    def show_chunks(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_EVERY:
            last = time.monotonic()
            screen.out(f"chunk {done:,}/{of:,}", highlight=False)

    yield show_document, show_chunks
