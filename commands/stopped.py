"""What `d2l train` says where it is stopped before its last step, and how the run goes on."""

import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2l.train.ranks import are_several
from d2l.train.stopping import Interrupted

if TYPE_CHECKING:
    from d2l.train.start import Start

STOPPED = 12  # exit code


@contextmanager
def told(run: Path | None, ignored: Sequence[str]) -> Iterator[None]:
    """Where a signal ends the run before its first step is taken, say what it leaves behind.

    Args:
        run: the run's folder; None: there is none yet.
        ignored: the texts of `--ignore`, which the run needs again.

    Raises:
        typer.Exit: a signal did.
    """
    try:
        yield
    except Interrupted as error:
        from d2l.io.run_folder import is_checkpoint, step_folders

        saved = run is not None and (step_folders(run) or is_checkpoint(run))
        left = f"; {to_go_on(run, ignored)}" if run and saved else ", and nothing was saved: start it again"
        typer.echo(f"{_rank()}Stopped by {error} before a step was taken{left}", err=True)
        raise typer.Exit(STOPPED) from None


def end_at_once(number: int) -> None:
    """End while libraries are loaded, whose half imported modules no exception should pass through."""
    name = signal.Signals(number).name
    write_at_once(f"{_rank()}Stopped by {name} before anything was read or written: start it again")
    os._exit(STOPPED)


def write_at_once(text: str) -> None:
    """Write to stderr from a signal's handler, which may have interrupted a print."""
    os.write(2, f"{text}\n".encode())


def to_go_on(run: Path, ignored: Sequence[str]) -> str:
    """Return the command that continues a run."""
    options = shlex.join(["train", "--resume", str(run), *(word for text in ignored for word in ("--ignore", text))])
    if are_several():
        return f"to go on, start all processes as before: {options}"
    return f"to go on: d2l {options}"


def nothing_to_do(start: "Start", max_steps: int) -> str:
    """Return why nothing is done, and how the run goes on."""
    return (
        f"nothing to do: {start.folder} is at step {start.step}, and max_steps is {max_steps}\n"
        f"to go on: --resume {start.folder} --max-steps N, with N above {start.step}; a schedule that ends at max_steps is "
        "another one then, which --allow-change max_steps=REASON has to allow"
    )


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if are_several() else ""
