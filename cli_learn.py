"""The commands about learning: pretrain a tiny base that can read, evaluate a checkpoint. Heavy imports come late."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer

from checks.result import jsonable
from d2l.errors import DataError

Format = Literal["text", "json"]
PLOTS = (".png", ".svg")


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    commands: tuple[tuple[str, Callable[..., None]], ...] = (("eval", evaluate), ("pretrain-tiny", pretrain_tiny))
    for name, command in commands:
        app.command(name)(command)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step folder, or a run's folder.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="JSONL, Parquet or a dataset folder.")],
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=2, help="At most N documents.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the other documents and the intervals.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="JSON to a new file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="A new .png or .svg file.")] = None,
    output_format: Annotated[Format, typer.Option("--format", help="Text for people, JSON for programs.")] = "text",
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Where the base lies now.")] = None,
) -> None:
    """Answer questions with a document's LoRA, another's, none, and in the prompt."""
    _require_new_files(output, plot)
    with redirect_stdout(sys.stderr):  # what libraries print meanwhile; stdout is for the scores
        from d2l.data.records import read_records
        from d2l.evaluate import evaluate as ask_everything
        from d2l.trained import load_trained

        records = read_records([data], limit)
        trained = load_trained(checkpoint, model)
        with progress("documents") as show:
            result = ask_everything(trained, records, seed=seed, max_new_tokens=max_new_tokens, on_progress=show)
        asked = {"checkpoint": str(checkpoint), "data": data, "seed": seed, "max_new_tokens": max_new_tokens}
        text = json.dumps(jsonable(asked | result.record()), ensure_ascii=False, indent=1)
        if output is not None:
            _write(output, lambda file: file.write_text(text + "\n", encoding="utf-8"))
        if plot is not None:
            from d2l.figures import draw

            _write(plot, lambda file: draw(result, file))
    if output_format == "json":
        typer.echo(text)
    else:
        from cli_tables import show_scores

        show_scores(result)


def pretrain_tiny(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Whose needles it must be able to read.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="A new folder; default: the config's model.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Such a model, to go on from; default: none."),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="R", min=1e-8, max=1, help="Of AdamW, until it can read.")
    ] = 1.2e-3,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of weights and data.")] = 0,
    max_steps: Annotated[int, typer.Option("--max-steps", metavar="N", min=1, help="Give up after N steps.")] = 3000,
) -> None:
    """Train a tiny GPT-OSS that answers questions on a document in its prompt."""
    from d2l.config_file import load_config
    from d2l.folders import require_absent

    settings = load_config(config)
    folder = Path(settings.model_name_or_path) if output is None else output
    require_absent(folder)
    with redirect_stdout(sys.stderr):
        from d2l.prepare import run_stages
        from d2l.pretrain import PASSING, load_reader, pretrain, save_reader

        model = None if start is None else load_reader(start)
    reached = None
    for reached in pretrain(seed, max_steps, run_stages(settings)[-1], model, learning_rate):
        _, at = reached
        typer.echo(f"step {at.step:>5}  loss {at.loss:.3f}  held-out exact match {at.accuracy:.3f}")
    assert reached is not None, "the last step is always measured"
    model, progress = reached
    save_reader(model, folder)
    typer.echo(f"model  {folder}")
    if progress.accuracy < PASSING:
        typer.echo(f"It stayed below {PASSING}: give it more --max-steps or another --seed.", err=True)
        raise typer.Exit(1)


def _require_new_files(output: Path | None, plot: Path | None) -> None:
    """Refuse what could not be written, before anything takes time."""
    from d2l.folders import require_new_file

    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise DataError(
            f"--plot {plot}: expected a name that ends in {' or '.join(PLOTS)}, found {plot.suffix or 'none'}"
        )
    for path in (output, plot):
        if path is not None:
            require_new_file(path)
    if output is not None and output == plot:
        raise DataError(f"-o and --plot both name {output}: give one of them another name")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    from d2l.folders import file_written_whole

    with file_written_whole(path) as partial:
        write(partial)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what shows how many are done, of what is named: a bar on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("documents", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
