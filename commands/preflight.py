"""The command that runs checks. Heavy imports come late."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from checks.formats import ReportFormat, require_format, write_report
from checks.result import FailLevel, Report, UsageError
from checks.time_limit import SECONDS
from commands.completion import complete_checks, complete_stages
from commands.console import (
    DataOption,
    GpuOption,
    IgnoreOption,
    ModelOption,
    SetOption,
    Texts,
    TokenizerOption,
    console,
    load_libraries,
    pairs,
    print_refused_plugins,
    read_config,
    waited,
)
from commands.progress import checks_progress
from d2l.io.atomic import require_new_file, write_new_file
from d2l.io.resources import resource

if TYPE_CHECKING:
    from checks.implementation import Implementation
    from checks.report import Detail
    from checks.runner import Observer
    from checks.selftest import Selftest
    from checks.subject import Subject
    from d2l.config.schema import RunConfig


def _print_schema(wanted: bool) -> None:
    if wanted:
        typer.echo(resource("docs/report.schema.json").read_text(encoding="utf-8"), nl=False)
        raise typer.Exit


ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="Configuration (YAML); default: a tiny GPT-OSS.")
]
StageOption = Annotated[
    Texts,
    typer.Option(
        "--stage",
        metavar="STAGE",
        help="Run this stage only: static, twin, data or device; repeatable.",
        autocompletion=complete_stages,
    ),
]
SelectOption = Annotated[
    Texts,
    typer.Option(
        "--select",
        metavar="CODE,...",
        help="Run these checks only: ATT101, ATT for all of those; repeatable.",
        autocompletion=complete_checks,
    ),
]
FailLevelOption = Annotated[
    FailLevel, typer.Option("--fail-level", help="Exit with 1 on findings of this severity and above.")
]
ReportOption = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the report to a new file.")
]
ReportFormatOption = Annotated[
    ReportFormat,
    typer.Option(
        "--format",
        help="Form of the report: text for people, html as a page; json, junit, sarif for programs; github: annotations.",
    ),
]
SchemaOption = Annotated[
    bool,
    typer.Option(
        "--schema",
        callback=_print_schema,
        is_eager=True,
        help="Print a JSON Schema of the JSON report and exit.",
    ),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print findings and the verdict alone.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Print the evidence and time of every check too.")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0, help="End a check after so long; 0: never.")
]
FixOption = Annotated[
    bool, typer.Option("--fix", help="Print the patch of the configuration that settles what a setting can settle.")
]
WriteOption = Annotated[
    bool,
    typer.Option(
        "--write", help="With --fix: put the patched file in the place of the old one, of which a copy is kept."
    ),
]
SelftestOption = Annotated[
    bool, typer.Option("--selftest", help="Plant every fault and demand that its check alone turns red.")
]
ImplementationOption = Annotated[
    str | None,
    typer.Option(
        "--implementation",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Examine another implementation of Doc-to-LoRA, the one that this function returns.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(preflight)


def preflight(
    config: ConfigArgument = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    gpu: GpuOption = None,
    stages: StageOption = None,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    fail_level: FailLevelOption = "error",
    output_format: ReportFormatOption = "text",
    output: ReportOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    timeout: TimeoutOption = SECONDS,
    implementation: ImplementationOption = None,
    selftest: SelftestOption = False,
    schema: SchemaOption = False,
    fix: FixOption = False,
    write: WriteOption = False,
) -> None:
    """Check a run before it costs money.

    Exit codes: 0 pass, 1 a finding at or above the fail level, 2 bad usage or config, 3 a check crashed, 4 a requested
    check did not run, 5 the selftest missed a planted fault.
    """
    reasons, chosen = pairs("--ignore", ignore or ()), list(settings or ())
    detail = _detail(quiet, verbose)
    _refuse_beside(selftest and reasons, "--selftest plants faults that the checks must see: leave --ignore out")
    _refuse_fix(config, fix, write, selftest or output or implementation or output_format != "text")
    require_format(output_format, selftest=selftest)
    if output is not None:
        require_new_file(output)
    if gpu is not None:
        from d2l.plan.cards import find_card

        chosen.append(f"device_memory={find_card(gpu).memory}")
    options: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "data": data}
    resolved = read_config(config, chosen, **options)
    load_libraries()  # takes seconds: mistakes above are reported at once

    from checks.foreign import load_implementation

    print_refused_plugins()
    foreign = None if implementation is None else load_implementation(implementation)
    requested = _Request(str(config or ""), stages or (), select or (), reasons, timeout, foreign)
    report = _plant_faults(resolved, requested) if selftest else _judge(resolved, requested)
    report = replace(report, seconds=waited())
    if fix and config is not None and isinstance(report, Report):
        from checks.report import print_report

        print_report(report, console(stderr=True), fail_level, detail)
        report = _fix(config, report, requested, {"overrides": pairs("--set", chosen), **options}, write=write)
    else:
        _deliver(report, output_format, output, fail_level, detail)
    raise typer.Exit(report.exit_code(fail_level))


@dataclass(frozen=True)
class _Request:
    """What a preflight was asked for, whatever the configuration."""

    name: str
    stages: Sequence[str]
    select: Sequence[str]
    reasons: Mapping[str, str]
    timeout: float
    implementation: "Implementation | None"


def _judge(config: "RunConfig", asked: _Request) -> Report:
    """Run the checks on a configuration."""
    from checks.choice import chosen_by
    from checks.plugins import with_plugins
    from checks.rules import RULES
    from checks.runner import run_checks

    selected, ignored = chosen_by(config, asked.select, asked.reasons)
    with _subject(config, asked) as (subject, observe):
        return run_checks(
            subject,
            with_plugins(RULES),
            stages=asked.stages,
            select=selected,
            ignore=ignored,
            observe=observe,
            seconds=asked.timeout,
        )


def _fix(config: Path, report: Report, asked: _Request, options: Mapping[str, Any], *, write: bool) -> Report:
    """Print the patch for what a report found; return the report that the command ends with.

    Args:
        options: of `load_config`, from the command line.
        write: put the patch into the file.
    """
    from commands.fix import fix
    from d2l.config.load import load_config

    read = partial(load_config, **options)
    proven = fix(config, report, read, lambda patched: _judge(patched, asked), write=write)
    return proven if proven is not None and write else report


def _plant_faults(config: "RunConfig", asked: _Request) -> "Selftest":
    from checks.plugins import with_plugins
    from checks.rules import RULES
    from checks.selftest import run_selftest

    with _subject(config, asked) as (subject, observe):
        return run_selftest(subject, with_plugins(RULES), stages=asked.stages, select=asked.select, observe=observe)


@contextmanager
def _subject(config: "RunConfig", asked: _Request) -> "Iterator[tuple[Subject, Observer]]":
    """Yield what is examined, with the progress of it shown meanwhile."""
    from checks.choice import reads_data
    from checks.production import make_subject
    from checks.threads import one_thread

    with_data = reads_data(asked.stages)
    with checks_progress() as (observe, on_tokenize), one_thread():
        yield make_subject(config, asked.name, on_tokenize, asked.implementation, with_data), observe


def _detail(quiet: bool, verbose: bool) -> "Detail":
    _refuse_beside(quiet and verbose, "-q prints less and -v more: leave one of them out")
    return "quiet" if quiet else "verbose" if verbose else "normal"


def _refuse_fix(config: Path | None, fix: bool, write: bool, others: object) -> None:
    """Refuse what does not go with a patch of a configuration."""
    _refuse_beside(write and not fix, "--write puts the patch of --fix into the file: give both")
    _refuse_beside(fix and others, "--fix prints a patch: leave --selftest, --implementation, --format and -o out")
    _refuse_beside(fix and not (config and config.is_file()), "--fix changes a configuration: name the file")


def _refuse_beside(given: object, message: str) -> None:
    """Refuse options that do not go together."""
    if given:
        raise UsageError(message)


def _deliver(
    report: "Report | Selftest", form: ReportFormat, output: Path | None, fail_level: FailLevel, detail: "Detail"
) -> None:
    """Print a format for programs, and nothing else, on stdout; with -o, write it to the file and print text."""
    from checks.report import plain_text, print_report

    text = plain_text(report, fail_level, detail) if form == "text" else write_report(report, form, fail_level)
    if form != "text" and output is None:
        typer.echo(text, nl=False)
    else:
        print_report(report, console(), fail_level, detail)
    if output is not None:  # behind what is printed, which a full disk does not lose
        with write_new_file(output) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
