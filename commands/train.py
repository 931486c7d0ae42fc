"""The command that trains: the preflight as a gate, then the loop with its progress. Heavy imports come late."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from checks.result import UsageError
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

    from d2l.config.schema import RunConfig
    from d2l.train.start import Start

REFUSED = 10  # exit code


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(train)


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="Configuration (YAML); with --resume, default: that of the run."),
    ] = None,
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
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="FIELD=REASON",
            help="Resume although this differs: a configuration key, data, base_config, tokenizer or chat. Repeatable.",
        ),
    ] = None,
    ignore: IgnoreOption = None,
) -> None:
    """Train, if the preflight finds nothing against it.

    Exit codes: 0 done, 2 bad usage or config, 10 refused by the preflight, 11 stopped on a value that is not finite.
    """
    options = {"model": model, "tokenizer": tokenizer, "data": data, "max_steps": max_steps, "output": output}
    reasons, changes = pairs("--ignore", ignore or ()), _changes(allow_change, resume)
    config = _config_file(config, resume, output)
    resolved = read_config(config, settings or (), **options)
    if not resolved.train_ds_names:
        raise DataError("no training data: pass --data FILE, or set train_ds_names")
    quiet = os.environ.get("RANK", "0") != "0"  # one of several processes prints, each one checks
    load_libraries(quiet=quiet)

    from checks.production import make_subject, one_thread
    from checks.report import print_report
    from checks.rules import RULES
    from checks.runner import run_checks
    from d2l.train.start import start_new, start_resumed, with_inputs
    from d2l.train.trackers import require_trackers

    require_trackers(resolved.report_to)
    screen = console(quiet=quiet)
    with start_resumed(resolved, resume, changes) if resume else start_new(resolved, numbered=output is None) as start:
        _print_notes(start.notes, quiet=quiet)
        if start.checkpoint is not None and start.step >= resolved.max_steps:
            screen.out(_nothing_to_do(start, resolved.max_steps), highlight=False)
            return
        with checks_progress() as (observe, on_tokenize), one_thread():
            subject = make_subject(resolved, str(config), on_tokenize)
            compared = with_inputs(start, subject.identity)
            report = run_checks(subject, RULES, ignore=reasons, observe=observe)
        _print_notes(compared.notes[len(start.notes) :], quiet=quiet)
        report = replace(report, seconds=waited())
        print_report(report, screen)
        if report.exit_code() != 0:
            typer.echo(
                "Error: training refused by preflight, nothing was written; `d2l explain CODE` explains a check",
                err=True,
            )
            raise typer.Exit(REFUSED)
        _train(resolved, compared, report.to_json(), screen)


def _print_notes(notes: Sequence[str], *, quiet: bool) -> None:
    for note in () if quiet else notes:
        typer.echo(f"Note: {note}", err=True)


def _changes(texts: Sequence[str] | None, resume: Path | None) -> dict[str, str]:
    """Return the reasons of `--allow-change` by field.

    Raises:
        UsageError: one is empty, or there is no run to change.
    """
    changes = pairs("--allow-change", texts or ())
    for field, reason in changes.items():
        if not reason.strip():
            raise UsageError(f"{field} is changed without a reason: write --allow-change {field}=REASON")
    if changes and resume is None:
        raise UsageError("--allow-change is about a run that is resumed: add --resume, or leave it out")
    return changes


def _config_file(config: Path | None, resume: Path | None, output: str | None) -> Path:
    """Return the configuration to read: the one named, else that of the run to resume.

    Raises:
        UsageError: there is none, or a run would be resumed into another folder.
    """
    if resume is None:
        if config is None:
            raise UsageError("CONFIG is missing: name a configuration, or continue a run with --resume DIR")
        return config
    runs = (resume, resume.absolute().parent.parent)  # a run's folder, or that of a checkpoint
    if output is not None and Path(output).resolve() not in [run.resolve() for run in runs]:
        raise UsageError(
            f"--resume {resume} goes on in its own folder, not in {output}: to continue that run leave --output out; "
            f"to start anew in {output} leave --resume out"
        )
    own = next((run / "config.yaml" for run in runs if (run / "config.yaml").is_file()), None)
    if config is None and own is None:
        raise UsageError(
            f"{resume} holds no config.yaml of a run: name the configuration, d2l train CONFIG --resume DIR"
        )
    return config or own  # type: ignore[return-value]


def _nothing_to_do(start: "Start", max_steps: int) -> str:
    """Return why nothing is done, and how the run goes on."""
    return (
        f"nothing to do: {start.folder} is at step {start.step}, and max_steps is {max_steps}\n"
        f"to go on: --resume {start.folder} --max-steps N, with N above {start.step}"
    )


def _train(config: "RunConfig", start: "Start", preflight: Mapping[str, Any], screen: "Console") -> None:
    """Train with a bar on a terminal and lines elsewhere, then print the last metrics and where the run lies."""
    from d2l.train.run import train

    if start.checkpoint is not None:
        screen.out(f"resumed from step {start.step} of {start.folder}", highlight=False)
    steps, tokens, last = 0, 0.0, dict[str, float]()
    with steps_progress(screen, config) as (show, on_tokenize):

        def on_step(record: Mapping[str, float]) -> None:
            nonlocal steps, tokens, last
            steps, tokens, last = steps + 1, tokens + record["tokens"], dict(record)
            show(record)

        train(config, start, preflight=preflight, on_step=on_step, on_tokenize=on_tokenize)
    rows = {"steps of this run": str(steps)} | {key: f"{last[key]:.6g}" for key in METRICS if key in last}
    if steps:
        rows["tokens"] = f"{tokens:,.0f}"
    rows["run folder"] = str(start.folder)
    width = max(map(len, rows))
    screen.out("\n".join(["", *(f"{label:<{width}}  {value}" for label, value in rows.items())]), highlight=False)
