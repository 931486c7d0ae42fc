"""Helpers of all commands: options, reading a configuration, loading libraries, progress, and where output goes."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from checks.result import UsageError
from commands.completion import complete_checks
from d2l.train.ranks import are_several, is_first

if TYPE_CHECKING:
    from rich.console import Console

    from d2l.config.schema import RunConfig
    from d2l.inference.load import TrainedModel

# This module is imported first of all. What came before it, Python's own start, was computing and not waiting.
_PROCESS_START = time.perf_counter() - time.process_time()

LOADING = "loading torch and transformers ..."

Format = Literal["text", "json"]
Texts = list[str] | None
OnProgress = Callable[[int, int], None]

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Base model: hub id, folder or config file.")
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", metavar="TOKENIZER", help="Tokenizer: hub id or folder.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="Training data: JSONL, Parquet or a dataset folder.")
]
SetOption = Annotated[Texts, typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration key; repeatable.")]
IgnoreOption = Annotated[
    Texts,
    typer.Option(
        "--ignore",
        metavar="CODE=REASON[@DATE]",
        help="Accept the finding of a check, until a day (YYYY-MM-DD) if one is given; it stays visible. Repeatable.",
        autocompletion=complete_checks,
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="GPU", help="Card that the run is planned for: H100, A100-80, ..., or a size: 24GiB."
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="Print text for people or JSON for programs.")]
CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint: a step folder, a run's folder (its newest one), or demo (a trained one that is shipped).",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Read the base model from here, if it moved since the training: hub id or folder.",
    ),
]


def read_config(path: Path | None, settings: Sequence[str], **options: Any) -> "RunConfig":
    """Read a configuration and print what was noted about its keys on stderr.

    Args:
        settings: `KEY=VALUE` texts of `--set`.
        options: see `load_config`.
    """
    from d2l.config.load import load_config

    config = load_config(path, pairs("--set", settings), **options)
    _print_remarks(config)
    return config


def read_checkpoint(place: Path, model: str | None) -> "TrainedModel":
    """Load a checkpoint, and print on stderr which it is and what was noted about it and its configuration.

    Args:
        model: where the base lies now, if not where it lay in training.
    """
    from d2l.inference.load import load_model

    trained = load_model(place, model)
    if trained.source is not None:
        for reason in trained.source.passed_over:
            typer.echo(f"Note: passed over a newer checkpoint: {reason}", err=True)
        typer.echo(f"checkpoint {trained.source.folder}", err=True)
    _print_remarks(trained.config)
    return trained


def print_refused_plugins() -> None:
    """Name on stderr the plugins whose checks are left out, and why."""
    from checks.plugins import load_plugins

    for plugin in load_plugins():
        for problem in plugin.problems:
            typer.echo(f"Note: checks of {plugin.name} are left out ({plugin.entry}): {problem}", err=True)


def _print_remarks(config: "RunConfig") -> None:
    """Print what was noted about the keys, once where several processes read them."""
    for remark in () if are_several() and not is_first() else config.remarks:
        typer.echo(f"Note: {remark}", err=True)


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Split the `KEY=VALUE` texts of an option into a mapping.

    Raises:
        UsageError: a text has another form, or a key is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            form = {"--ignore": "CODE=REASON", "--allow-change": "FIELD=REASON"}.get(option, "KEY=VALUE")
            raise UsageError(f"{option} expects {form}. Got {text!r}")
        if key.strip() in found:
            raise UsageError(f"{option} {key.strip()} is given twice")
        found[key.strip()] = value
    return found


def console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    """Make a console that prints text as it stands: no markup, no emoji, no highlighting."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def waited() -> float:
    """Return the seconds since this process started."""
    return time.perf_counter() - _PROCESS_START


def load_libraries(*, quiet: bool = False) -> None:
    """Import what takes seconds, after naming it on stderr: by a status on a terminal, by one line elsewhere.

    Args:
        quiet: print nothing, as one of several processes.
    """
    screen = console(stderr=True, quiet=quiet)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # its bars would run into ours
    with redirect_stdout(sys.stderr):
        if screen.is_terminal and not screen.is_dumb_terminal:
            with screen.status(LOADING):
                import_module("d2l.build")  # imports both
        else:
            screen.out(LOADING, highlight=False)
            import_module("d2l.build")
        _silence_transformers()


def _silence_transformers() -> None:
    """Switch off the bars of transformers, such as those of loading weights; downloads keep theirs: they take minutes."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads_are_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # switches those of the hub off too
    if downloads_are_shown:
        enable_progress_bars()


@contextmanager
def libraries_to_stderr() -> Iterator[None]:
    """Load the libraries, then send what they print meanwhile to stderr: stdout is for the command's own output."""
    load_libraries()
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """Yield a function that shows how many are done, of how many: a bar on a terminal's stderr, nothing elsewhere.

    Args:
        what: the things that are counted.
    """
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
