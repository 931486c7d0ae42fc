"""Commands for trained checkpoints: internalize a document, import a checkpoint. Heavy imports are late."""

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
    commands: tuple[Callable[..., None], ...] = (internalize, import_reference)
    for command in commands:
        app.command()(command)


def internalize(
    checkpoint: CheckpointArgument,
    document: DocumentArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="ADAPTER_DIR", help="Write the adapter to this new folder.")
    ],
    model: BaseOption = None,
) -> None:
    """Turn a document into a PEFT adapter."""
    from d2l.io.atomic import require_new_folder

    require_new_folder(output)
    text = _read(document)
    with libraries_to_stderr():
        from d2l.inference.adapter import export_adapter
        from d2l.inference.generate import internalize as make_lora

        trained = read_checkpoint(checkpoint, model)
        lora = make_lora(trained, text)
        rank = export_adapter(lora, trained.model.base, output, trained.config.model_name_or_path)
    typer.echo(
        f"adapter  {output}\n"
        f"rank     {rank}, on {', '.join(lora.A)} of every layer\n"
        f"base     {trained.config.model_name_or_path}\n"
        f"use      PeftModel.from_pretrained(base, {str(output)!r})"
    )


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

        convert(file, output)
        state = load_checkpoint(output).state
    typer.echo(f"checkpoint  {output}\nbase        {state['config']['model_name_or_path']}")


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
