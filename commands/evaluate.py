"""Commands that evaluate a checkpoint and pretrain a tiny base. Heavy imports are late."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from checks.json_values import jsonable
from commands.console import (
    BaseOption,
    CheckpointArgument,
    FormatOption,
    libraries_to_stderr,
    progress,
    read_checkpoint,
)
from d2l.errors import DataError

PLOTS = (".png", ".svg")


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    commands: tuple[tuple[str, Callable[..., None]], ...] = (("eval", evaluate), ("pretrain-tiny", pretrain_tiny))
    for name, command in commands:
        app.command(name)(command)


def evaluate(
    checkpoint: CheckpointArgument,
    data: Annotated[
        str,
        typer.Option("--data", metavar="FILE", help="Documents with questions: JSONL, Parquet or a dataset folder."),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=2, help="Evaluate at most N documents.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Generate at most N tokens for an answer.")
    ] = 64,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed for drawing the other documents and the intervals.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write every answer as JSON to a new file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the scores to a new .png or .svg file.")
    ] = None,
    output_format: FormatOption = "text",
    model: BaseOption = None,
) -> None:
    """Evaluate a checkpoint under four conditions.

    Every question is answered with its document's LoRA, with another document's, without a document, and with the document
    in the prompt.
    """
    _require_new_files(output, plot)
    with libraries_to_stderr():
        from d2l.data.records import read_records
        from d2l.evaluation.run import evaluate as run_evaluation

        records = read_records([data], limit)
        trained = read_checkpoint(checkpoint, model)
        with progress("documents") as show:
            result = run_evaluation(trained, records, seed=seed, max_new_tokens=max_new_tokens, on_progress=show)
        used = checkpoint if trained.source is None else trained.source.folder
        settings = {"checkpoint": str(used), "data": data, "seed": seed, "max_new_tokens": max_new_tokens}
        text = json.dumps(jsonable(settings | result.to_json()), ensure_ascii=False, indent=1)
        if output is not None:
            _write(output, lambda file: file.write_text(text + "\n", encoding="utf-8"))
        if plot is not None:
            from d2l.evaluation.figures import draw_figure

            _write(plot, lambda file: draw_figure(result, file))
    if output_format == "json":
        typer.echo(text)
    else:
        from commands.tables import show_scores

        show_scores(result)


def pretrain_tiny(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML) whose needles the base must answer.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Write the base to this new folder; default: the config's model."
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Continue training this tiny base; default: random weights.",
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="R", min=1e-8, max=1, help="Learning rate of AdamW after warm-up.")
    ] = 1.2e-3,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of weights and data.")] = 0,
    max_steps: Annotated[int, typer.Option("--max-steps", metavar="N", min=1, help="Give up after N steps.")] = 3000,
) -> None:
    """Pretrain a tiny GPT-OSS as a base for needles.

    It answers questions about a document in its prompt.
    """
    from d2l.config.load import load_config
    from d2l.io.atomic import require_new_folder

    settings = load_config(config)
    folder = Path(settings.model_name_or_path) if output is None else output
    require_new_folder(folder)
    with libraries_to_stderr():
        from d2l.tiny.pretrain import TARGET_ACCURACY, load_tiny_base, pretrain, save_tiny_base

        model = None if start is None else load_tiny_base(start)
    latest = None
    for latest in pretrain(seed, max_steps, settings.stages[-1], model, learning_rate):
        _, at = latest
        typer.echo(f"step {at.step:>5}  loss {at.loss:.3f}  held-out exact match {at.accuracy:.3f}")
    assert latest is not None, "the last step is always evaluated"
    model, reached = latest
    save_tiny_base(model, folder)
    typer.echo(f"model  {folder}")
    if reached.accuracy < TARGET_ACCURACY:
        typer.echo(f"It stayed below {TARGET_ACCURACY}: give it more --max-steps or another --seed.", err=True)
        raise typer.Exit(1)


def _require_new_files(output: Path | None, plot: Path | None) -> None:
    """Refuse paths that cannot be written, before anything takes time."""
    from d2l.io.atomic import require_new_file

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
    """Let `write` make a new file, which appears at `path` when it is complete."""
    from d2l.io.atomic import write_new_file

    with write_new_file(path) as partial:
        write(partial)
