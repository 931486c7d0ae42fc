"""The commands about checks: run them, list them, explain one. Heavy imports come late."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checks.formats import ReportFormat, require_format, write_report
from checks.result import FailLevel, Report, UsageError
from commands.console import (
    DataOption,
    FormatOption,
    GpuOption,
    IgnoreOption,
    ModelOption,
    OnProgress,
    SetOption,
    Texts,
    TokenizerOption,
    console,
    load_libraries,
    pairs,
    read_config,
    waited,
)
from d2l.io.atomic import require_new_file, write_new_file
from d2l.io.resources import resource

if TYPE_CHECKING:
    from checks.runner import Observer
    from checks.selftest import Selftest


def _print_schema(wanted: bool) -> None:
    if wanted:
        typer.echo(resource("docs/report.schema.json").read_text(encoding="utf-8"), nl=False)
        raise typer.Exit


ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="Configuration (YAML); default: a tiny GPT-OSS.")
]
StageOption = Annotated[
    Texts,
    typer.Option("--stage", metavar="STAGE", help="Run this stage only: static, twin, data or device; repeatable."),
]
SelectOption = Annotated[Texts, typer.Option("--select", metavar="CODE", help="Run this check only; repeatable.")]
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
    """Register the commands with the application."""
    app.command()(preflight)
    app.command()(explain)
    app.command()(checks)


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
    implementation: ImplementationOption = None,
    selftest: SelftestOption = False,
    schema: SchemaOption = False,
) -> None:
    """Check a run before it costs money.

    Exit codes: 0 pass, 1 a finding at or above the fail level, 2 bad usage or config, 3 a check crashed, 4 a requested
    check did not run, 5 the selftest missed a planted fault.
    """
    reasons = pairs("--ignore", ignore or ())
    if selftest and reasons:
        raise UsageError("--selftest plants faults that the checks must see: leave --ignore out")
    require_format(output_format, selftest=selftest)
    if output is not None:
        require_new_file(output)
    chosen = list(settings or ())
    if gpu is not None:
        from d2l.plan.cards import find_card

        chosen.append(f"device_memory={find_card(gpu).memory}")
    resolved = read_config(config, chosen, model=model, tokenizer=tokenizer, data=data)
    load_libraries()  # takes seconds: mistakes above are reported at once

    from checks.foreign import load_implementation
    from checks.production import make_subject, one_thread
    from checks.rules import RULES
    from checks.runner import run_checks
    from checks.selftest import run_selftest

    report: Report | Selftest
    with checks_progress() as (observe, on_tokenize), one_thread():
        foreign = None if implementation is None else load_implementation(implementation)
        needs_data = not stages or "data" in stages
        subject = make_subject(resolved, str(config or ""), on_tokenize, foreign, needs_data)
        if selftest:
            report = run_selftest(subject, RULES, stages=stages or (), select=select or (), observe=observe)
        else:
            report = run_checks(
                subject, RULES, stages=stages or (), select=select or (), ignore=reasons, observe=observe
            )
    _deliver(replace(report, seconds=waited()), output_format, output, fail_level)
    raise typer.Exit(report.exit_code(fail_level))


def explain(
    check: Annotated[str, typer.Argument(metavar="CODE", help="Check to explain, by its code or name.")],
) -> None:
    """Explain what a check does and how to fix what it finds."""
    from checks import docs
    from checks.catalogue import read_catalogue

    typer.echo(docs.explain(read_catalogue(), check), nl=False)


def checks(output_format: FormatOption = "text") -> None:
    """List every check."""
    from checks.catalogue import read_catalogue
    from checks.docs import as_json, as_list

    catalogue = read_catalogue()
    typer.echo(as_json(catalogue) if output_format == "json" else as_list(catalogue))


@contextmanager
def checks_progress() -> "Iterator[tuple[Observer, OnProgress]]":
    """Yield two functions that show, on a terminal, which check is running and how many records are tokenized."""
    screen = console(stderr=True)
    with redirect_stdout(sys.stderr):
        if not screen.is_terminal:
            yield lambda rule: None, lambda done, records: None
            return
        with screen.status("starting") as status:
            yield (
                lambda rule: status.update(f"{rule.code} {rule.name}"),
                lambda done, records: status.update(f"tokenizing: {done:,} of {records:,} records"),
            )


def _deliver(report: "Report | Selftest", form: ReportFormat, output: Path | None, fail_level: FailLevel) -> None:
    """Print a format for programs, and nothing else, on stdout; with -o, write it to the file and print text."""
    from checks.report import print_report

    text = write_report(report, form, fail_level)
    if output is not None:
        with write_new_file(output) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    if form != "text" and output is None:
        typer.echo(text, nl=False)
    else:
        print_report(report, console(), fail_level)
