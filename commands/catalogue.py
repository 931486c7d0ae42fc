"""The commands that list checks, explain one, and compare two reports of them. Heavy imports come late."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.completion import complete_checks
from commands.console import FormatOption, print_refused_plugins

if TYPE_CHECKING:
    from checks.differences import Difference


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    app.command()(explain)
    app.command()(checks)
    app.command()(diff)


def explain(
    check: Annotated[
        str,
        typer.Argument(metavar="CODE", help="Check to explain, by its code or name.", autocompletion=complete_checks),
    ],
) -> None:
    """Explain what a check does and how to fix what it finds."""
    from checks import docs
    from checks.plugins import full_catalogue

    print_refused_plugins()
    typer.echo(docs.explain(full_catalogue(), check), nl=False)


def checks(output_format: FormatOption = "text") -> None:
    """List every check, those of plugins too."""
    from checks.docs import as_json, as_list
    from checks.plugins import full_catalogue

    print_refused_plugins()
    catalogue = full_catalogue()
    typer.echo(as_json(catalogue) if output_format == "json" else as_list(catalogue))


def diff(
    before: Annotated[Path, typer.Argument(metavar="REPORT", help="JSON report, or a run's folder.")],
    after: Annotated[Path, typer.Argument(metavar="REPORT", help="Another one, which is compared with it.")],
    output_format: FormatOption = "text",
) -> None:
    """Say what changed between two reports.

    Of equal outcomes it names measured numbers that differ by a factor of 10 and more. Exit codes: 0 all outcomes are the
    same, 1 one differs, 2 bad usage.
    """
    from checks.differences import differences, read_report

    found = differences(read_report(before), read_report(after))
    if output_format == "json":
        typer.echo(json.dumps([asdict(it) for it in found], indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(map(_in_a_line, found)) or "no difference")
    raise typer.Exit(any(it.kind == "outcome" for it in found))


def _in_a_line(it: "Difference") -> str:
    message = f": {it.message}" if it.message else ""
    return " ".join(f"{it.name}: {it.before} → {it.after}{message}".split())
