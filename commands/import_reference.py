"""The command that imports a checkpoint of the reference. Heavy imports are late."""

from pathlib import Path
from typing import Annotated

import typer

from commands.console import libraries_to_stderr


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(import_reference)


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
