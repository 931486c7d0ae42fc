"""Commands for trained checkpoints: ask about a document, import a checkpoint. Heavy imports are late."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from commands.console import BaseOption, CheckpointArgument, libraries_to_stderr, read_checkpoint
from d2l.errors import DataError

STDIN = "-"

DocumentArgument = Annotated[
    str, typer.Argument(metavar="DOCUMENT", help="Document: a text file (.txt, .md), or - for stdin.")
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    commands: tuple[Callable[..., None], ...] = (ask, import_reference)
    for command in commands:
        app.command()(command)


def ask(
    checkpoint: CheckpointArgument,
    document: DocumentArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Question about the document.")],
    model: BaseOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Generate at most N tokens.")
    ] = 256,
) -> None:
    """Answer a question about a document.

    The document is turned into a LoRA; it is not in the prompt.
    """
    if not question.strip():
        raise DataError("the question is empty")
    text = _read(document)
    with libraries_to_stderr():
        from d2l.inference.generate import ask as generate_answer
        from d2l.inference.generate import internalize as make_lora

        trained = read_checkpoint(checkpoint, model)
        answer = generate_answer(trained, make_lora(trained, text), question, max_new_tokens)
    typer.echo(answer)


def import_reference(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint of the reference: a pytorch_model.bin.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Write the checkpoint to this new folder.")
    ],
) -> None:
    """Import a checkpoint of the reference.

    No code in the file is executed.
    """
    with libraries_to_stderr():
        from d2l.checkpoint import load_checkpoint
        from d2l.reference.load import import_reference as convert

        notes = convert(file, output)
        state = load_checkpoint(output).state
    typer.echo(f"checkpoint  {output}\nbase        {state['config']['model_name_or_path']}")
    for note in notes:
        typer.echo(f"note        {note}")


def _read(document: str) -> str:
    """Read the text of a document.

    Raises:
        DataError: the file cannot be read, or is not text.
    """
    from d2l.data.document import decode_document

    if document == STDIN:
        return decode_document(typer.get_binary_stream("stdin").read(), "stdin")
    try:
        return decode_document(Path(document).read_bytes(), document)
    except OSError as error:
        raise DataError(f"cannot read {document}: {error.strerror}; pass a text file, or - for stdin") from None
