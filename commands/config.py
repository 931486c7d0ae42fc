"""The commands about configuration files: list and explain their keys, write a new one. Heavy imports come late."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from checks.result import UsageError
from commands.console import Format, FormatOption, console

if TYPE_CHECKING:
    from d2l.config.keys import Key

WIDE = 100  # columns from which a table has room for meanings
Preset = Literal["tiny", "gpt-oss-20b", "gpt-oss-20b-recommended", "needle"]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    app.command()(config)
    app.command()(init)


def config(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Key to explain, old names and the reference's included.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON Schema of the YAML file, for editors.")
    ] = False,
    output_format: FormatOption = "text",
) -> None:
    """List the configuration's keys, or explain one.

    The first lines of a file that `d2l init` wrote say how an editor completes and checks keys by the schema.
    """
    if schema and key is not None:
        raise UsageError(f"--schema describes all keys: leave {key} or --schema out")
    if schema:
        from d2l.config.json_schema import json_schema

        typer.echo(_json(json_schema()))
    elif key is not None:
        typer.echo(_explanation(key, output_format))
    else:
        _list(output_format)


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New file to write, or - for standard output.")] = Path(
        "run.yaml"
    ),
    preset: Annotated[
        Preset, typer.Option("--preset", help="Shipped configuration that the values are taken from.")
    ] = "gpt-oss-20b",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Base model in place of the preset's: hub id, folder or file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Training data: JSONL, Parquet, a glob or a dataset folder."),
    ] = None,
) -> None:
    """Write a commented configuration to start from."""
    from d2l.config.template import render_template
    from d2l.io.atomic import require_new_file, write_new_file

    if preset == "needle" and data is not None:
        raise UsageError("--preset needle generates its documents: leave --data out, or choose another preset")
    for option, value in (("--model", model), ("--data", data)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} is empty: name one, or leave the option out")
    if str(file) == "-":
        typer.echo(render_template(preset, "run.yaml", model=model, data=data), nl=False)
        return
    require_new_file(file)
    text = render_template(preset, str(file), model=model, data=data)
    with write_new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"configuration  {file}\npreset         {preset}\nnext           d2l preflight {shlex.quote(str(file))}")


def _explanation(name: str, form: Format) -> str:
    from d2l.config.explain import explain, facts
    from d2l.config.suggest import hint

    text, known = explain(name), facts(name)
    if text is None:
        raise UsageError(f"no key {name}; {hint(name)}")
    return text if form == "text" else _json(known)


def _list(form: Format) -> None:
    """Print all keys: a table on a terminal, a line each in a pipe, or JSON."""
    from d2l.config.explain import as_lines
    from d2l.config.keys import all_keys

    keys = list(all_keys().values())
    screen = console()
    if form == "json":
        typer.echo(_json([key.to_json() for key in keys]))
    elif screen.is_terminal and not screen.is_dumb_terminal and screen.width >= WIDE:
        _table(keys)
    else:
        typer.echo(as_lines(keys))


def _table(keys: "list[Key]") -> None:
    from itertools import groupby

    from rich import box
    from rich.table import Table

    table = Table("key", "type", "default", "meaning", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[1:3]:
        column.max_width, column.overflow = 14, "fold"
    for group, members in groupby(keys, key=lambda key: key.group):
        table.add_section()
        table.add_row(group, style="bold")
        for key in members:
            table.add_row(key.name, key.kind.replace("|", ", "), key.default, key.text)
    console().print(table)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
