"""The console script: the application, its commands, and what their errors exit with."""

import errno
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from commands.installation import require_one_installation

require_one_installation()  # before the imports below: they would find the modules of another d2l

from checks.result import UsageError  # noqa: E402 - see above
from commands import (  # noqa: E402
    ask,
    autopsy,
    catalogue,
    config,
    data,
    evaluate,
    import_reference,
    internalize,
    plan,
    preflight,
    probe,
    runs,
    train,
)
from commands.refusals import tell_refusal  # noqa: E402
from d2l.errors import D2LError, NonFiniteError, ProcessError  # noqa: E402

# Exit codes; README has all of them. 10 and 12 are those of `d2l train`, 14 of `d2l internalize`: some documents failed.
USAGE, NON_FINITE, PROCESSES, INTERRUPTED = 2, 11, 13, 130


class Commands(TyperGroup):
    """The group of all commands: a user's mistake becomes one message and an exit code, a fault of ours a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except D2LError as error:
            tell_refusal(str(error), getattr(error, "__notes__", ()))
            raise typer.Exit(_exit_code(error)) from None
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise
            tell_refusal("nothing more can be written: the disk behind standard output is full", ())
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt as error:
            typer.echo("\n".join(["Interrupted.", *getattr(error, "__notes__", ())]), err=True)
            raise typer.Exit(INTERRUPTED) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the chosen command, and refuse an option that its arguments give twice."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:  # a shell completes a line that is not whole yet
            _refuse_repeated(command, type(ctx)(command, info_name=name, parent=ctx), rest)
        return name, command, rest


def _exit_code(error: D2LError) -> int:
    codes = {NonFiniteError: NON_FINITE, ProcessError: PROCESSES}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), USAGE)


def _refuse_repeated(command: Any, ctx: Any, args: list[str]) -> None:
    """Refuse an option that is given twice and takes one value, of which click would take the last without a word."""
    if isinstance(command, TyperGroup):
        if args and not args[0].startswith("-"):
            name, command, args = command.resolve_command(ctx, args)
            _refuse_repeated(command, type(ctx)(command, info_name=name, parent=ctx), args)
        return
    _, _, given = command.make_parser(ctx).parse_args(list(args))
    for option in given:
        single = option.param_type_name == "option" and not (option.multiple or option.is_flag or option.count)
        if single and given.count(option) > 1:
            several = "; several files: a glob, or the key train_ds_names" if "--data" in option.opts else ""
            raise UsageError(f"{option.opts[-1]} is given {given.count(option)} times and takes one value{several}")


app = typer.Typer(
    cls=Commands,
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


COMMANDS = (
    *(preflight, catalogue, plan, train, runs, autopsy),
    *(internalize, ask, probe, evaluate, data, import_reference, config),
)
for commands in COMMANDS:
    commands.add_commands(app)


def _plain_warning(message: Warning | str, category: type[Warning], *place: object, **line: object) -> str:
    """Format a warning for a user: what it says, and its kind where it is not ours, without a line of source."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    return f"Warning: {kind}{message}\n"


def main() -> None:
    """Run the console script; a terminal that cannot show a sign gets its escape, not a crash."""
    warnings.formatwarning = _plain_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="d2l")


if __name__ == "__main__":
    main()
