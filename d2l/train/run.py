"""Training run: its folder, its components and the training loop, for a configuration that passed preflight."""

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
from d2l.train.events import note_event
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import METRICS
from d2l.train.processes import processes
from d2l.train.trackers import started_trackers

CONFIG, PREFLIGHT = "config.yaml", "preflight.json"

# Settings that may change when a run is resumed: its length, how often it saves and reports, paths, and its memory.
_CHANGEABLE = {
    "max_steps",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "cache",
    "cache_dir",
    "device_memory",
    "expert_transient_gib",
    "logging_steps",
    "report_to",
}


def new_folder(config: RunConfig, *, numbered: bool) -> Path:
    """Return the folder for a new run, not yet made; the main process chooses for all.

    Args:
        numbered: take the next free `NAME-2`, `NAME-3`, … where the configured folder is in use; else refuse it.

    Raises:
        CheckpointError: the folder is in use and `numbered` is off.
    """
    configured = Path(config.output_dir)
    choice = next(filter(_is_free, _number_folders(configured) if numbered else [configured]), None)
    processes()  # joins the group, so that there is a main process
    (folder,) = broadcast_object_list([choice])
    if folder is None:
        raise CheckpointError(
            f"{configured} is not empty, and nothing is written over; choose another --output, "
            f"or continue the run in it with --resume {configured}"
        )
    return folder


def checkpoint_to_resume(config: RunConfig, place: Path) -> tuple[Path, Checkpoint]:
    """Load the checkpoint to resume from, and return it with its run's folder.

    Args:
        place: a checkpoint folder, or a run's folder, whose newest valid checkpoint is loaded.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made with another configuration.
    """
    folder = find_checkpoint(place)
    checkpoint = load_checkpoint(folder)
    if not checkpoint.trainer:
        raise CheckpointError(f"{folder} holds a trained model, but no run to continue: it was imported")
    ours, theirs = config.resolved(), with_current_names(checkpoint.state.get("config", {}))[0]
    changed = [key for key in ours if key not in _CHANGEABLE and ours[key] != theirs.get(key)]
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
        folder: a new or empty folder, or the folder of the run to which `checkpoint` belongs.
        preflight: report of the preflight as JSON values, kept in the folder.
        checkpoint: checkpoint to resume from; None: start anew.
        on_step: called after every step with its metrics, as in metrics.jsonl.
        on_tokenize: called while the data is tokenized, with the number of records done, and of all.

    Raises:
        D2LError: see `d2l.build` and `d2l.train.loop.train_steps`.
    """
    this = processes()  # before the base is loaded: gives each process a GPU of its own
    components = Components(config, on_tokenize)
    rows = components.rows  # before the base is loaded: errors in the data should come first
    trainer = Trainer(components.model, rows, config)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if this.is_main_process:
            _rewind(folder, trainer.step_number)
            note_event(folder, f"resumed after step {trainer.step_number:,}")
    elif this.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (folder / PREFLIGHT).write_text(json.dumps(preflight, indent=1, ensure_ascii=False), encoding="utf-8")
    this.wait_for_everyone()
    evidence = {"fingerprint": preflight["fingerprint"], "preflight": preflight["summary"]}
    with started_trackers(config, folder, trainer.step_number) as track:
        for metrics in train_steps(trainer, folder, **evidence):
            record = metrics.to_json()
            track(record)
            on_step(record)


def _rewind(folder: Path, step: int) -> None:
    """Prepare a run's folder for repeating the steps after `step`.

    Later checkpoints (damaged, or skipped by choice) are renamed; metrics of later steps are removed.
    """
    resumed = step_folder(folder, step)
    for later in sorted(resumed.parent.glob("step-*")):
        if later.name > resumed.name:
            later.rename(next(filter(_is_free, _number_folders(later.with_name(f"superseded-{later.name}")))))
    metrics = folder / METRICS
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(lines[:step]), encoding="utf-8")  # one line for each step


def _number_folders(place: Path) -> Iterator[Path]:
    """Yield `NAME`, `NAME-2`, `NAME-3`, …"""
    yield place
    yield from (place.with_name(f"{place.name}-{number}") for number in count(2))


def _is_free(folder: Path) -> bool:
    """Return whether a folder is absent or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
