"""Names in a run's folder, and its checkpoints in the order of their steps. Read without torch.

OUTPUT/
    run.json          id of the run, and what was changed on purpose when it was resumed
    config.yaml       configuration of the newest start
    preflight.json    report of the preflight before the first start
    metrics.jsonl     one object for each step
    evaluation.jsonl  one object for each evaluation, where there are some
    events.jsonl      one object for each resume, and for each warning of `d2l.train.watch`
    autopsy/          see `d2l.train.autopsy`, where a step was refused; autopsy-2, ... for later ones
    checkpoints/      a folder step-NNNNNN for each, see `d2l.checkpoint`
    .lock             pid and host of the process that trains in it; absent where none does
"""

import re
from pathlib import Path

RUN, CONFIG, PREFLIGHT = "run.json", "config.yaml", "preflight.json"
METRICS, EVALUATIONS, EVENTS = "metrics.jsonl", "evaluation.jsonl", "events.jsonl"
AUTOPSY_FOLDER, LOCK = "autopsy", ".lock"
MANIFEST, STATE = "manifest.json", "state.json"  # of a checkpoint; the manifest's presence makes the folder one
_STEP = re.compile(r"step-([0-9]+)")


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, however little of it is left."""
    return folder.is_dir() and any(
        place.exists() for place in (folder / CONFIG, folder / METRICS, checkpoints_folder(folder))
    )


def checkpoints_folder(run: Path) -> Path:
    """Return the folder of all checkpoints in a run's folder."""
    return run / "checkpoints"


def step_folder(run: Path, step: int) -> Path:
    """Return the checkpoint folder of a step in a run's folder."""
    return checkpoints_folder(run) / f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """Return the step that a folder is named after; None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(run: Path) -> list[Path]:
    """Return the step folders of a run, oldest first, whole or not; links are followed by nobody and are among them."""
    found = [
        (step, folder) for folder in checkpoints_folder(run).glob("step-*") if (step := step_of(folder)) is not None
    ]
    return [folder for _, folder in sorted(found)]


def is_checkpoint(place: Path) -> bool:
    """Return whether a path is meant as a checkpoint's folder and not as a run's."""
    return step_of(place) is not None or (place / MANIFEST).is_file()
