"""The command that shows why a run was stopped on a value that is not finite: tables on a terminal, lines elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checks.catalogue import read_catalogue
from checks.lookalikes import lookalikes
from commands.console import FormatOption, console
from d2l.train.autopsy import AUTOPSY, Autopsy, Values, newest_autopsy, read_autopsy

if TYPE_CHECKING:
    from rich.console import Console

_LATEST = 12  # tensors on the way that are printed; all are in the JSON


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command("autopsy")(autopsy)


def autopsy(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder (its newest autopsy), or an autopsy folder.")
    ],
    output_format: FormatOption = "text",
) -> None:
    """Show why a run was stopped on a value that is not finite, the first suspect first."""
    folder = run if (run / AUTOPSY).is_file() else newest_autopsy(run)
    if folder is None:
        if output_format == "json":
            typer.echo("null")
        else:
            typer.echo(f"{run} holds no autopsy: none of its steps was stopped on a value that is not finite")
        return
    found = read_autopsy(folder)
    codes = lookalikes(found.suspects[0].phase, found.suspects[0].module) if found.suspects else ()
    names = {facts.code: facts.name for facts in read_catalogue()}
    checks = [f"{code} {names[code]}" for code in codes]
    if output_format == "json":
        document = {"folder": str(folder), **found.to_json(), "checks": list(codes)}
        typer.echo(json.dumps(document, ensure_ascii=False, indent=1))
        return
    screen = console()
    _show(screen, None, (), [[name, text] for name, text in _summary(folder, found, checks).items()])
    suspects = [
        [str(number), it.phase, it.module or "-", it.tensor, _list(it.records) or "-", it.what]
        for number, it in enumerate(found.suspects, start=1)
    ]
    if suspects:
        _show(screen, "suspects", ("", "part of the step", "module", "tensor", "records", "values"), suspects)
    alone = [[str(it.record), "finite" if it.finite else it.first] for it in found.alone]
    if alone:
        _show(screen, "records, replayed one at a time", ("record", "first value that is not finite"), alone)
    trail = [[it.phase, it.module or "-", it.tensor, *_range(it.values)] for it in found.trail]
    if trail:
        first = {(it.phase, it.module) for it in found.suspects[:1]}
        places = (n for n, it in enumerate(found.trail) if (it.phase, it.module) in first and not it.values.finite)
        last = 1 + next(places, len(trail))
        title = "on the way to the first suspect"
        columns = ("part of the step", "module", "tensor", "lowest", "highest", "not finite")
        _show(screen, title, columns, trail[max(0, last - _LATEST) : last])


def _summary(folder: Path, found: Autopsy, checks: Sequence[str]) -> dict[str, str]:
    """Return the facts that stand above the tables."""
    rank = f", rank {found.rank} of {found.processes}" if found.processes > 1 else ""
    return {
        "autopsy": str(folder),
        "step": f"{found.step}{rank} (records {_list(found.records) or 'unknown'})",
        "guard": f"{found.guard}: {found.finding}",
        "first suspect": str(found.suspects[0]) if found.suspects else "none",
        "replay": found.replay,
        "looks like": "; ".join(checks) + " (`d2l explain CODE`)" if checks else "no check of the catalogue",
        "checkpoint": f"{found.checkpoint} (sound by its hashes and values)" if found.checkpoint else "none is sound",
        "reproduce": found.command,
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }


def _list(records: Sequence[int]) -> str:
    return ", ".join(map(str, records))


def _range(values: Values) -> list[str]:
    """Return the cells of a tensor's range, and of how many values are not finite (empty: all are)."""
    counts = [f"{count:,} {kind}" for kind, count in (("nan", values.nan), ("inf", values.inf)) if count]
    return [*("-" if end is None else f"{end:.3g}" for end in (values.low, values.high)), ", ".join(counts)]


def _show(screen: "Console", title: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; elsewhere than on a terminal its cells in columns, so that none is cut or wrapped."""
    if not screen.is_terminal:
        lines = [header, *rows] if header else rows
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        cells = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        text = [line.rstrip() for line in cells]
        typer.echo("\n".join(["", title, *text] if title else text))
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=bool(header))
    for name in header or ("", ""):
        table.add_column(name, overflow="fold")  # nothing is cut off on a narrow terminal
    for row in rows:
        table.add_row(*row)
    screen.print(table)
