"""The console script: the application, its commands, and what their errors exit with."""

import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from commands.installation import require_one_installation

require_one_installation()  # before the imports below: they would find the modules of another d2l

from commands import adapter, data, evaluate, preflight, train  # noqa: E402 - see above
from d2l.errors import D2LError, NonFiniteError  # noqa: E402

USAGE, NON_FINITE, INTERRUPTED = 2, 11, 130  # exit codes


class Commands(TyperGroup):
    """The group of all commands: a user's mistake becomes one message and an exit code, a fault of ours a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except D2LError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(NON_FINITE if isinstance(error, NonFiniteError) else USAGE) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from checks.runner import installed_version

        typer.echo(f"d2l {installed_version()}")
        raise typer.Exit


@app.callback()
def d2l(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find out before a Doc-to-LoRA training run whether it can work; then train."""


for commands in (preflight, train, adapter, evaluate, data):
    commands.add_commands(app)


def main() -> None:
    """Run the console script; a terminal that cannot show a sign gets its escape, not a crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="d2l")


if __name__ == "__main__":
    main()
