"""The commands of d2l: they wire configuration, checks and training together, and print. Heavy imports come late."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import cli_data
import cli_learn
import cli_use
from checks.result import FailLevel, Report, UsageError
from d2l.errors import D2LError, NonFiniteError

if TYPE_CHECKING:
    from rich.console import Console

    from checks.runner import Observer
    from checks.selftest import Selftest
    from d2l.config import RunConfig
    from d2l.train.checkpoint import Checkpoint

USAGE, REFUSED, NON_FINITE, INTERRUPTED = 2, 10, 11, 130
METRICS = ("ce_loss", "kl_loss", "grad_norm", "gen_lora_l1_norm", "tokens")

Format = Literal["text", "json"]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Hub id, folder or config file.")]
TokenizerOption = Annotated[str | None, typer.Option("--tokenizer", metavar="TOKENIZER", help="Hub id or folder.")]
DataOption = Annotated[str | None, typer.Option("--data", metavar="FILE", help="JSONL, Parquet or a dataset folder.")]
Texts = list[str] | None
SetOption = Annotated[Texts, typer.Option("--set", metavar="KEY=VALUE", help="Set a config key; repeatable.")]
IgnoreOption = Annotated[Texts, typer.Option("--ignore", metavar="CODE=REASON", help="Let a finding pass, visibly.")]
FormatOption = Annotated[Format, typer.Option("--format", help="Text for people, JSON for programs.")]


class Commands(TyperGroup):
    """Turns what users can mend into one message and an exit code; only our own faults show a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except D2LError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(NON_FINITE if isinstance(error, NonFiniteError) else USAGE) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Find out before a Doc-to-LoRA training run whether it can work; then train."""


@app.command()
def preflight(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML; default: a tiny GPT-OSS.")] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    stages: Annotated[
        Texts, typer.Option("--stage", metavar="STAGE", help="Only static, twin, data or device.")
    ] = None,
    select: Annotated[Texts, typer.Option("--select", metavar="CODE", help="Only this check; repeatable.")] = None,
    ignore: IgnoreOption = None,
    fail_level: Annotated[FailLevel, typer.Option("--fail-level", help="What makes the exit code 1.")] = "error",
    output_format: FormatOption = "text",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Report to a new file.")] = None,
    selftest: Annotated[bool, typer.Option("--selftest", help="Plant every fault: is each check able to see?")] = False,
) -> None:
    """Check a run before it costs money.

    Exit codes: 0 pass, 1 a finding at or above the fail level, 2 bad usage or config, 3 a check crashed, 4 a check that
    was asked for did not run, 5 the selftest missed a planted fault.
    """
    reasons = _pairs("--ignore", ignore or ())
    if selftest and reasons:
        raise UsageError("--selftest plants faults that have to be seen: leave --ignore out")
    if output is not None:
        _require_new_file(output)
    resolved = _load(config, _pairs("--set", settings or ()), model=model, tokenizer=tokenizer, data=data)

    from checks.production import (  # only here: it takes seconds, and mistakes above are said at once
        make_subject,
        one_thread,
    )
    from checks.rules import RULES
    from checks.runner import run
    from checks.selftest import run_selftest

    report: Report | Selftest
    with _progress() as (observe, on_tokenize), one_thread():
        subject = make_subject(resolved, str(config or ""), on_tokenize)
        if selftest:
            report = run_selftest(subject, RULES, stages=stages or (), select=select or (), observe=observe)
        else:
            report = run(subject, RULES, stages=stages or (), select=select or (), ignore=reasons, observe=observe)
    _deliver(report, output_format, output, fail_level)
    raise typer.Exit(report.exit_code(fail_level))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML.")],
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps in all.")] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="The run's folder.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="A run or its checkpoint.")] = None,
    ignore: IgnoreOption = None,
) -> None:
    """Train, if the preflight finds nothing against it.

    Exit codes: 0 done, 2 bad usage or config, 10 refused by the preflight, 11 stopped on a value that is not finite.
    """
    options = {"model": model, "tokenizer": tokenizer, "data": data, "max_steps": max_steps, "output": output}
    reasons = _pairs("--ignore", ignore or ())
    resolved = _load(config, _pairs("--set", settings or ()), **options)

    from checks.production import make_subject, one_thread
    from checks.report import print_report
    from checks.rules import RULES
    from checks.runner import run
    from d2l.train.run import checkpoint_to_resume, new_folder

    if resume is None:
        folder, checkpoint = new_folder(resolved, numbered=output is None), None
    else:
        folder, checkpoint = checkpoint_to_resume(resolved, resume)
    console = _console(quiet=os.environ.get("RANK", "0") != "0")  # one of several processes speaks, each one checks
    with _progress() as (observe, on_tokenize), one_thread():
        report = run(make_subject(resolved, str(config), on_tokenize), RULES, ignore=reasons, observe=observe)
    print_report(report, console)
    if report.exit_code() != 0:
        typer.echo("Error: training refused by preflight, nothing was written; `d2l explain CODE` says more", err=True)
        raise typer.Exit(REFUSED)
    _train(resolved, folder, checkpoint, report.to_json(), console)


@app.command()
def explain(check: Annotated[str, typer.Argument(metavar="CODE", help="A check's code or name.")]) -> None:
    """Say what a check does and how to fix what it finds."""
    from checks import docs
    from checks.rules import RULES

    typer.echo(docs.explain(RULES, check), nl=False)


@app.command()
def checks(output_format: FormatOption = "text") -> None:
    """List every check."""
    from checks.docs import as_json, as_list
    from checks.rules import RULES

    typer.echo(as_json(RULES) if output_format == "json" else as_list(RULES))


cli_use.add_commands(app)
cli_learn.add_commands(app)
cli_data.add_commands(app)


def main() -> None:
    """The console script; a terminal that cannot show a sign gets its escape, not a crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="d2l")


def _train(
    config: "RunConfig", folder: Path, checkpoint: "Checkpoint | None", preflight: Mapping[str, Any], console: "Console"
) -> None:
    """Train with a bar on a terminal and lines elsewhere, then say what came out and where it lies."""
    from d2l.train.run import train

    records: list[Mapping[str, float]] = []
    with _steps(console, config.max_steps) as (show, on_tokenize):

        def on_step(record: Mapping[str, float]) -> None:
            records.append(record)
            show(record)

        train(config, folder, preflight=preflight, checkpoint=checkpoint, on_step=on_step, on_tokenize=on_tokenize)
    rows = {"steps of this run": str(len(records))}
    if records:
        rows |= {key: f"{records[-1][key]:.6g}" for key in METRICS if key in records[-1]}
        rows["tokens"] = f"{sum(record['tokens'] for record in records):,.0f}"
    rows["run folder"] = str(folder)
    width = max(map(len, rows))
    console.out("\n".join(["", *(f"{label:<{width}}  {value}" for label, value in rows.items())]), highlight=False)


@contextmanager
def _steps(
    console: "Console", total: int
) -> "Iterator[tuple[Callable[[Mapping[str, float]], None], Callable[[int, int], None]]]":
    """Yields what shows one line of metrics, and what shows how many records are tokenized."""
    if not console.is_terminal or console.is_dumb_terminal:

        def say_all(done: int, records: int) -> None:
            if done == records:
                console.out(f"tokenized {records:,} records", highlight=False)

        yield (
            lambda it: console.out(f"step {it['step']:.0f}/{total}  {_numbers(it, METRICS)}", highlight=False),
            say_all,
        )
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = TextColumn("{task.fields[numbers]}", markup=False)
    with Progress(MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn(), numbers, console=console) as bar:
        data = bar.add_task("tokenizing", total=None, numbers="records tokenized")
        task = bar.add_task("training", total=total, numbers="")
        yield (
            lambda it: bar.update(task, completed=it["step"], numbers=_numbers(it, METRICS[:3])),
            lambda done, records: bar.update(data, completed=done, total=records),
        )


def _numbers(record: Mapping[str, float], keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {record[key]:.4g}" for key in keys if key in record)


@contextmanager
def _progress() -> "Iterator[tuple[Observer, Callable[[int, int], None]]]":
    """Yields what names, on a terminal, the check that is running, and what says how many records are tokenized.

    What libraries print meanwhile goes to stderr.
    """
    console = _console(stderr=True)
    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield lambda rule: None, lambda done, records: None
            return
        with console.status("starting") as status:
            yield (
                lambda rule: status.update(f"{rule.code} {rule.name}"),
                lambda done, records: status.update(f"tokenizing: {done:,} of {records:,} records"),
            )


def _load(path: Path | None, settings: Mapping[str, str], **options: Any) -> "RunConfig":
    from d2l.config_file import load_config

    config = load_config(path, settings, **options)
    for remark in config.remarks:
        typer.echo(f"Note: {remark}", err=True)
    return config


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` texts of one option as a mapping."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} expects {'CODE=REASON' if option == '--ignore' else 'KEY=VALUE'}. Got {text!r}")
        if key.strip() in pairs:
            raise UsageError(f"{option} {key.strip()} is given twice")
        pairs[key.strip()] = value
    return pairs


def _require_new_file(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten: move it away or give -o another name")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist: make it or give -o another name")


def _deliver(report: "Report | Selftest", form: Format, output: Path | None, fail_level: FailLevel) -> None:
    """Pure JSON on stdout where it was asked for; with -o, the chosen format in the file and text on stdout."""
    from checks.report import json_text, plain_text, print_report

    text = json_text(report, fail_level) if form == "json" else plain_text(report, fail_level)
    if output is not None:
        try:
            with output.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"the report cannot be written to {output}: {error.strerror}") from None
    if form == "json" and output is None:
        typer.echo(text, nl=False)
    else:
        print_report(report, _console(), fail_level)


def _console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


if __name__ == "__main__":
    main()
