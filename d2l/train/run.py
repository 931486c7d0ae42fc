"""One training run: its folder, its parts put together, and the loop, from a configuration that preflight passed."""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from d2l.build import Components
from d2l.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, step_folder
from d2l.config.renamed import with_current_names
from d2l.config.schema import RunConfig
from d2l.data.tokenize import OnProgress
from d2l.errors import CheckpointError
from d2l.train.loop import METRICS, Trainer, train_steps
from d2l.train.processes import processes

CONFIG, PREFLIGHT = "config.yaml", "preflight.json"

# What may differ when a run is continued: how far, how often it saves, and where things lie.
_FREE_TO_CHANGE = {"max_steps", "save_steps", "save_total_limit", "output_dir", "cache", "cache_dir"}


def new_folder(config: RunConfig, *, numbered: bool) -> Path:
    """The folder for a new run, not yet made; the main process decides for all, and may make it before others look.

    Args:
        numbered: take the next free `NAME-2`, `NAME-3`, … where the configured one is in use; else refuse it.

    Raises:
        CheckpointError: the folder is in use and `numbered` is off.
    """
    wanted = Path(config.output_dir)
    choice = next(filter(_is_free, _numbered(wanted) if numbered else [wanted]), None)
    processes()  # joined, so that there is a main one
    (folder,) = broadcast_object_list([choice])
    if folder is None:
        raise CheckpointError(
            f"{wanted} is not empty, and nothing is written over; choose another --output, "
            f"or continue the run in it with --resume {wanted}"
        )
    return folder


def checkpoint_to_resume(config: RunConfig, place: Path) -> tuple[Path, Checkpoint]:
    """The run folder and the checkpoint to continue from.

    Args:
        place: a checkpoint folder, or a run's folder, whose newest whole checkpoint is taken.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made with another configuration.
    """
    folder = find_checkpoint(place)
    checkpoint = load_checkpoint(folder)
    if not checkpoint.trainer:
        raise CheckpointError(f"{folder} holds a trained model, but no run to continue: it was imported")
    ours, theirs = config.resolved(), with_current_names(checkpoint.state.get("config", {}))[0]
    changed = [key for key in ours if key not in _FREE_TO_CHANGE and ours[key] != theirs.get(key)]
    if changed:
        lines = [f"  {key}: {theirs.get(key)!r} in the checkpoint, {ours[key]!r} now" for key in changed]
        raise CheckpointError("\n".join([f"{folder} was made with another configuration:", *lines]))
    return folder.resolve().parent.parent, checkpoint


def train(
    config: RunConfig,
    folder: Path,
    *,
    preflight: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Mapping[str, float]], None],
    on_tokenize: OnProgress = lambda done, total: None,
) -> None:
    """Train in `folder` to the configured number of steps.

    Args:
        folder: new and empty, or that of the run that `checkpoint` is of.
        preflight: the report that let the run start, as JSON values; kept in the folder.
        checkpoint: where to continue.
        on_step: called after every step with its line of metrics.jsonl.
        on_tokenize: called while the data is tokenized, with the records that are done and all of them.

    Raises:
        D2LError: see `d2l.build` and `d2l.train.loop.run`.
    """
    this = processes()  # before the base is loaded: gives each process a GPU of its own
    components = Components(config, on_tokenize)
    rows = components.rows  # before the base is loaded: data that cannot be used should be said first
    trainer = Trainer(components.model, rows, config)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if this.is_main_process:
            _rewind(folder, trainer.step_number)
    elif this.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (folder / PREFLIGHT).write_text(json.dumps(preflight, indent=1, ensure_ascii=False), encoding="utf-8")
    this.wait_for_everyone()
    for metrics in train_steps(trainer, folder, fingerprint=preflight["fingerprint"], preflight=preflight["summary"]):
        on_step(metrics.to_json())


def _rewind(folder: Path, step: int) -> None:
    """Make way in a run's folder for the steps after `step`, which are taken again.

    Later checkpoints (damaged, or passed over by choice) are kept under another name; metrics of later steps are cut off.
    """
    resumed = step_folder(folder, step)
    for later in sorted(resumed.parent.glob("step-*")):
        if later.name > resumed.name:
            later.rename(next(filter(_is_free, _numbered(later.with_name(f"superseded-{later.name}")))))
    metrics = folder / METRICS
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(lines[:step]), encoding="utf-8")  # one line for each step


def _numbered(place: Path) -> Iterator[Path]:
    """`NAME`, `NAME-2`, `NAME-3`, …"""
    yield place
    yield from (place.with_name(f"{place.name}-{number}") for number in count(2))


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
