"""The commands that look at runs: status, plot and report. They load no model; heavy imports come late."""

import json
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.console import FormatOption, console, libraries_to_stderr
from commands.progress import clock, thousands
from d2l.errors import DataError

if TYPE_CHECKING:
    from d2l.train.history import RunHistory

RunsArgument = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or a folder of runs.")]
STYLES = {"running": "green", "done": "bold", "died": "bold red", "died?": "red", "stopped": "yellow"}


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    app.command()(status)
    app.command()(plot)
    app.command()(report)


def status(runs: RunsArgument, output_format: FormatOption = "text") -> None:
    """Say how runs go, a line each, also while they train."""
    from rich.text import Text

    from d2l.train.history import find_runs, read_history

    now = time.time()
    facts = [status_facts(read_history(folder, newest=True), now) for folder in find_runs(runs)]
    if output_format == "json":
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    rows = [
        ("run", "step", "loss", "held-out", "tokens/s", "eta", "checkpoint", "written", "state"),
        *map(_status_cells, facts),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    screen = console()
    for row in rows:
        *cells, state = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        line = Text("  ".join(cells)).append(f"  {state}".rstrip(), STYLES.get(state.strip()))
        screen.print(line, soft_wrap=True)


def plot(
    runs: RunsArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Draw the curves to a new .svg or .png file.")
    ],
) -> None:
    """Draw losses, gradient norm, learning rate and speed of runs over their steps, several runs over each other."""
    from d2l.io.atomic import require_new_file, write_new_file
    from d2l.train.history import find_runs, read_history

    _require_suffix(output, (".svg", ".png"))
    require_new_file(output)
    histories = [read_history(folder) for folder in find_runs(runs)]
    from d2l.evaluation.curves import draw_curves

    with write_new_file(output) as partial:
        draw_curves(histories, partial)
    typer.echo(f"curves  {output}")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to this new .html file; default: report.html in the run's folder.",
        ),
    ] = None,
) -> None:
    """Write one page about a run, which needs no other file: preflight, curves, sample, evaluation, events."""
    from d2l.io.atomic import require_new_file, write_new_file
    from d2l.train.history import find_runs, read_history

    folders = find_runs([run])
    if folders != [run]:
        raise DataError(f"{run} is a folder of runs: name one of them, such as {folders[0]}")
    place = _free_page(run) if output is None else output
    _require_suffix(place, (".html",))
    require_new_file(place)
    history = read_history(run)
    with libraries_to_stderr():
        from commands.run_page import render_page

        page = render_page(history, time.time())
    with write_new_file(place) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    typer.echo(f"report  {place}")


def status_facts(history: "RunHistory", now: float) -> dict[str, Any]:
    """Return what is known of a run as JSON values: None where it is unknown, times in seconds."""
    from d2l.train.history import heldout_losses, loss_keys, series, speeds

    losses, tokens = series(history.records, loss_keys()), speeds(history.records)
    heldout = heldout_losses(history)
    state = history.state(now)
    newest = history.checkpoints[-1] if history.checkpoints else None
    return {
        "run": str(history.folder),
        "state": state,
        "step": history.step,
        "max_steps": history.max_steps,
        "loss": losses[-1][1] if losses else None,
        "heldout_loss": heldout[-1][1] if heldout else None,
        "tokens_per_second": tokens[-1][1] if tokens else None,
        "eta_seconds": history.eta if state.startswith("running") else None,
        "checkpoint": None if newest is None else str(newest.folder),
        "written_seconds_ago": history.age(now),
        "damaged_lines": history.damaged,
        "first_step": history.first_step or None,
    }


def _status_cells(facts: dict[str, Any]) -> tuple[str, ...]:
    def of(value: Any, write: Any) -> str:
        return "-" if value is None else str(write(value))

    return (
        facts["run"],
        f"{facts['step']:,}" + of(facts["max_steps"], lambda most: f"/{most:,}").replace("-", ""),
        of(facts["loss"], lambda loss: f"{loss:.4g}"),
        of(facts["heldout_loss"], lambda loss: f"{loss:.4g}"),
        of(facts["tokens_per_second"], thousands),
        of(facts["eta_seconds"], clock),
        of(facts["checkpoint"], lambda folder: Path(folder).name),
        of(facts["written_seconds_ago"], lambda seconds: f"{clock(seconds)} ago"),
        facts["state"],
    )


def _require_suffix(path: Path, allowed: Sequence[str]) -> None:
    if path.suffix.lower() not in allowed:
        raise DataError(
            f"-o {path}: expected a name that ends in {' or '.join(allowed)}, found {path.suffix or 'none'}"
        )


def _free_page(run: Path) -> Path:
    """Return report.html in a run's folder, or report-2.html, ... where there is one."""
    names = (f"report{'' if number == 1 else f'-{number}'}.html" for number in count(1))
    return next(run / name for name in names if not (run / name).exists())
