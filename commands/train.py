"""The command that trains: the preflight as a gate, then the loop with its progress. Heavy imports come late."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checks.differences import read_report
from checks.result import UsageError
from commands.console import (
    DataOption,
    IgnoreOption,
    ModelOption,
    SetOption,
    Texts,
    TokenizerOption,
    console,
    load_libraries,
    pairs,
    read_config,
    waited,
)
from commands.progress import METRICS, checks_progress, steps_progress
from commands.refusals import tell_refusal
from commands.stopped import STOPPED, end_at_once, nothing_to_do, to_go_on, told, write_at_once
from d2l.errors import DataError
from d2l.io.run_folder import CONFIG, PREFLIGHT
from d2l.train.ranks import is_first
from d2l.train.stopping import StopRequest, stop_on_signals

if TYPE_CHECKING:
    from rich.console import Console

    from checks.result import Report
    from d2l.config.schema import RunConfig
    from d2l.train.start import Start

REFUSED = 10  # exit code

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="Configuration (YAML); with --resume, default: that of the run.")
]
MaxStepsOption = Annotated[
    int | None, typer.Option("--max-steps", metavar="N", help="Stop after N optimizer steps in all.")
]
MaxMinutesOption = Annotated[
    float | None,
    typer.Option(
        "--max-minutes",
        metavar="M",
        min=0,
        help="Stop, saved, at the end of the step in which M minutes have passed since the start of this command.",
    ),
]
OutputOption = Annotated[str | None, typer.Option("--output", metavar="DIR", help="Write the run to this folder.")]
ResumeOption = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Continue the run in this folder, or from this checkpoint folder."),
]
AllowChangeOption = Annotated[
    Texts,
    typer.Option(
        "--allow-change",
        metavar="FIELD=REASON",
        help="Resume although this differs: a configuration key, data, base_config, tokenizer or chat. Repeatable.",
    ),
]


PreflightOption = Annotated[
    Path | None,
    typer.Option(
        "--preflight",
        metavar="REPORT",
        help="Take the checks of this passing JSON report, if it judged the same run; a resumed run's own is tried by itself.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(train)


def train(
    config: ConfigArgument = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    max_steps: MaxStepsOption = None,
    max_minutes: MaxMinutesOption = None,
    output: OutputOption = None,
    resume: ResumeOption = None,
    allow_change: AllowChangeOption = None,
    ignore: IgnoreOption = None,
    preflight: PreflightOption = None,
) -> None:
    """Train, if the preflight finds nothing against it.

    SIGTERM, SIGUSR1 and SIGINT stop a run at the end of its step, saved; a second one ends it at once.

    Exit codes: 0 done, 2 bad usage or config, 10 refused by the preflight, 11 stopped on a value that is not finite,
    12 stopped by a signal or --max-minutes, 13 another process of the run is gone or differs.
    """
    reasons, changes = pairs("--ignore", ignore or ()), _changes(allow_change, resume)
    first = is_first()  # one of several processes prints, each one checks
    stop = StopRequest(max_minutes, announce=write_at_once if first else lambda text: None)
    with stop_on_signals(end_at_once):
        config = _config_file(config, resume, output)
        options = {"model": model, "tokenizer": tokenizer, "data": data, "max_steps": max_steps, "output": output}
        resolved = read_config(config, settings or (), **options)
        if not resolved.train_ds_names:
            raise DataError("no training data: pass --data FILE, or set train_ds_names")
        if preflight is not None:
            read_report(preflight)
        load_libraries(quiet=not first)
    with stop_on_signals(stop.receive):
        from d2l.train.processes import process_group
        from d2l.train.start import start_new, start_resumed

        numbered = output is None
        with (
            process_group(),
            told(resume, ignore or ()),
            start_resumed(resolved, resume, changes) if resume else start_new(resolved, numbered=numbered) as start,
            told(start.folder, ignore or ()),
        ):
            own = start.folder / PREFLIGHT if resume else None
            earlier = preflight or (own if own is not None and own.exists() else None)
            stopped_by = _check_and_train(resolved, str(config), start, reasons, earlier, stop, quiet=not first)
        if stopped_by is not None:
            if first:
                typer.echo(f"Stopped by {stopped_by}, saved; {to_go_on(start.folder, ignore or ())}", err=True)
            raise typer.Exit(STOPPED)


def _check_and_train(
    config: "RunConfig",
    name: str,
    start: "Start",
    reasons: Mapping[str, str],
    earlier: Path | None,
    stop: StopRequest,
    *,
    quiet: bool,
) -> str | None:
    """Run the preflight, and train where it finds nothing; return what the run was stopped by.

    Args:
        earlier: a report, or the folder of a run that has one, which may speak for this run.

    Raises:
        typer.Exit: the preflight refuses the run.
    """
    from checks.choice import chosen_by
    from checks.gate import reuse
    from checks.plugins import with_plugins
    from checks.production import make_subject
    from checks.report import print_report
    from checks.rules import RULES
    from checks.runner import run_checks
    from checks.threads import one_thread
    from d2l.train.start import with_inputs
    from d2l.train.trackers import require_trackers

    require_trackers(config.report_to)
    screen = console(quiet=quiet)
    _print_notes(start.notes, quiet=quiet)
    if start.checkpoint is not None and start.step >= config.max_steps:
        screen.out(nothing_to_do(start, config.max_steps), highlight=False)
        return None
    with checks_progress() as (observe, on_tokenize), one_thread():
        subject = make_subject(config, name, on_tokenize)
        compared = with_inputs(start, subject.identity)
        accepted, rules = chosen_by(config, (), reasons)[1], with_plugins(RULES)
        report, said = reuse(earlier, subject, rules, accepted, observe) if earlier else (None, "")
        if report is None:
            report = run_checks(subject, rules, ignore=accepted, observe=observe)
    _print_notes([*compared.notes[len(start.notes) :], *filter(None, [said])], quiet=quiet)
    report = replace(report, seconds=waited())
    print_report(report, screen, ends=False)
    if report.exit_code() != 0:
        _tell_findings(report)
        raise typer.Exit(REFUSED)
    return _train(config, compared, report, screen, stop)


def _tell_findings(report: "Report") -> None:
    """Tell that the preflight refuses the run; in another process than the first, whose report is printed, with its own."""
    findings = [] if is_first() else [f"  {it.code} {it.name}: {it.message}" for it in report.failures]
    codes = ", ".join(it.code for it in report.failures)
    refusal = f"training refused by preflight, nothing was written: {codes}; `d2l explain CODE` explains a check"
    tell_refusal(refusal, findings)


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
    own = next((run / CONFIG for run in runs if (run / CONFIG).is_file()), None)
    if config is None and own is None and not resume.exists():
        raise UsageError(f"--resume {resume} does not exist: `d2l status FOLDER` lists the runs below a folder")
    if config is None and own is None:
        raise UsageError(
            f"{resume} holds no config.yaml of a run: name the configuration, d2l train CONFIG --resume DIR"
        )
    return config or own  # type: ignore[return-value]


def _train(config: "RunConfig", start: "Start", report: "Report", screen: "Console", stop: StopRequest) -> str | None:
    """Train with a bar on a terminal and lines elsewhere, then print the last metrics and where the run lies.

    Returns what the run was stopped by; None where all steps are taken.
    """
    from checks.predictions import predicted_by
    from d2l.train.run import train

    if start.checkpoint is not None:
        screen.out(f"resumed from step {start.step} of {start.folder}", highlight=False)
    steps, tokens, last = 0, 0.0, dict[str, float]()
    with steps_progress(screen, config) as (show, on_tokenize):

        def on_step(record: Mapping[str, float]) -> None:
            nonlocal steps, tokens, last
            steps, tokens, last = steps + 1, tokens + record["tokens"], dict(record)
            show(record)

        stopped_by = train(
            config,
            start,
            preflight=report.to_json(),
            prediction=predicted_by(report),
            on_step=on_step,
            on_tokenize=on_tokenize,
            stop=stop,
        )
    rows = {"steps of this run": str(steps)} | {key: f"{last[key]:.6g}" for key in METRICS if key in last}
    if steps:
        rows["tokens"] = f"{tokens:,.0f}"
    rows["run folder"] = str(start.folder)
    width = max(map(len, rows))
    screen.out("\n".join(["", *(f"{label:<{width}}  {value}" for label, value in rows.items())]), highlight=False)
    return stopped_by
