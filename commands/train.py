"""The command that trains: the preflight as a gate, then the loop with its progress. Heavy imports come late."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.console import (
    DataOption,
    IgnoreOption,
    ModelOption,
    SetOption,
    TokenizerOption,
    console,
    load_libraries,
    pairs,
    read_config,
    waited,
)
from commands.preflight import checks_progress
from commands.progress import METRICS, steps_progress
from d2l.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from d2l.checkpoint import Checkpoint
    from d2l.config.schema import RunConfig

REFUSED = 10  # exit code


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(train)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML).")],
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", help="Stop after N optimizer steps in all.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="Write the run to this folder.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="DIR", help="Continue the run in this folder, or from this checkpoint folder."
        ),
    ] = None,
    ignore: IgnoreOption = None,
) -> None:
    """Train, if the preflight finds nothing against it.

    Exit codes: 0 done, 2 bad usage or config, 10 refused by the preflight, 11 stopped on a value that is not finite.
    """
    options = {"model": model, "tokenizer": tokenizer, "data": data, "max_steps": max_steps, "output": output}
    reasons = pairs("--ignore", ignore or ())
    resolved = read_config(config, settings or (), **options)
    if not resolved.train_ds_names:
        raise DataError("no training data: pass --data FILE, or set train_ds_names")
    quiet = os.environ.get("RANK", "0") != "0"  # one of several processes prints, each one checks
    load_libraries(quiet=quiet)

    from checks.production import make_subject, one_thread
    from checks.report import print_report
    from checks.rules import RULES
    from checks.runner import run_checks
    from d2l.train.run import checkpoint_to_resume, new_folder
    from d2l.train.trackers import require_trackers

    require_trackers(resolved.report_to)
    if resume is None:
        folder, checkpoint = new_folder(resolved, numbered=output is None), None
    else:
        folder, checkpoint = checkpoint_to_resume(resolved, resume)
    screen = console(quiet=quiet)
    with checks_progress() as (observe, on_tokenize), one_thread():
        report = run_checks(make_subject(resolved, str(config), on_tokenize), RULES, ignore=reasons, observe=observe)
    report = replace(report, seconds=waited())
    print_report(report, screen)
    if report.exit_code() != 0:
        typer.echo(
            "Error: training refused by preflight, nothing was written; `d2l explain CODE` explains a check", err=True
        )
        raise typer.Exit(REFUSED)
    _train(resolved, folder, checkpoint, report.to_json(), screen)


def _train(
    config: "RunConfig", folder: Path, checkpoint: "Checkpoint | None", preflight: Mapping[str, Any], screen: "Console"
) -> None:
    """Train with a bar on a terminal and lines elsewhere, then print the last metrics and where the run lies."""
    from d2l.train.run import train

    steps, tokens, last = 0, 0.0, dict[str, float]()
    with steps_progress(screen, config) as (show, on_tokenize):

        def on_step(record: Mapping[str, float]) -> None:
            nonlocal steps, tokens, last
            steps, tokens, last = steps + 1, tokens + record["tokens"], dict(record)
            show(record)

        train(config, folder, preflight=preflight, checkpoint=checkpoint, on_step=on_step, on_tokenize=on_tokenize)
    rows = {"steps of this run": str(steps)} | {key: f"{last[key]:.6g}" for key in METRICS if key in last}
    if steps:
        rows["tokens"] = f"{tokens:,.0f}"
    rows["run folder"] = str(folder)
    width = max(map(len, rows))
    screen.out("\n".join(["", *(f"{label:<{width}}  {value}" for label, value in rows.items())]), highlight=False)
