"""What the folder of a run tells, also while the run goes on: read without torch, and never a crash over its files.

Files may be absent, half written or of an earlier version: what is missing is left out.
"""

import fcntl
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import yaml

from d2l.config.schema import LossName
from d2l.errors import DataError
from d2l.io.run_folder import (
    CONFIG,
    EVALUATIONS,
    LOCK,
    MANIFEST,
    METRICS,
    PREFLIGHT,
    STATE,
    is_run,
    step_folders,
    step_of,
)
from d2l.train.events import FAILED, STOPPED, Event, read_events, was_autopsied
from d2l.train.first_step import FIRST_STEP
from d2l.train.metrics import LOSS_SUFFIX, PEAK_SUFFIX

Record = Mapping[str, Any]
State = Literal["running", "running?", "done", "stopped", "died", "died?", "empty"]

TAIL = 2**18  # bytes at the end of metrics.jsonl that tell how a run goes: hundreds of steps
_RECENT = 50  # steps whose median speed stands for those to come
_PATIENCE = 60.0  # seconds without a write before a run without a lock counts as ended, or as many as ten steps take


@dataclass(frozen=True)
class CheckpointEntry:
    """A complete checkpoint: its step, folder, bytes, and when it was written, in seconds since 1970."""

    step: int
    folder: Path
    size: int
    written: float


@dataclass(frozen=True)
class RunHistory:
    """What is known of a run.

    Attributes:
        folder: the run's folder.
        config: its config.yaml; empty where it cannot be read.
        preflight: its preflight.json; empty where it cannot be read.
        records: lines of metrics.jsonl, one a step, in order; of a step that was taken twice the later one.
        damaged: lines of metrics.jsonl that could not be read.
        evaluations: lines of evaluation.jsonl, likewise.
        checkpoints: complete ones, the newest last.
        first_step: figures predicted and measured, as the newest checkpoint keeps them; empty where it has none.
        events: resumes, superseded checkpoints, autopsies, by time.
        written: when the run last wrote, in seconds since 1970; None where it wrote nothing.
        locked: whether a process holds the run's lock; None where there is no lock.
    """

    folder: Path
    config: Record
    preflight: Record
    records: Sequence[Record]
    damaged: int
    evaluations: Sequence[Record]
    checkpoints: Sequence[CheckpointEntry]
    first_step: Mapping[str, Record]
    events: Sequence[Event]
    written: float | None
    locked: bool | None

    @property
    def step(self) -> int:
        """The last step of which there are metrics or a checkpoint; 0 before the first."""
        saved = self.checkpoints[-1].step if self.checkpoints else 0
        return max(int(self.records[-1]["step"]) if self.records else 0, saved)

    @property
    def max_steps(self) -> int | None:
        """The configured length, in steps."""
        value = self.config.get("max_steps")
        return value if isinstance(value, int) else None

    @property
    def seconds_per_step(self) -> float | None:
        """The median of the newest steps."""
        recent = [value for _, value in series(self.records[-_RECENT:], ["seconds"])]
        return median(recent) if recent else None

    @property
    def eta(self) -> float | None:
        """Seconds to the configured length at the speed of the newest steps; None where it is unknown."""
        if self.max_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.max_steps - self.step) * self.seconds_per_step

    def age(self, now: float) -> float | None:
        """Return the seconds since the run last wrote, 0 where the clock has jumped; None where it wrote nothing."""
        return None if self.written is None else max(0.0, now - self.written)

    def state(self, now: float) -> State:
        """Judge whether the run goes on; a question mark where only the time of the last write tells.

        A held lock is a living writer, and a lock that nobody holds was left by a process that was killed. Without a
        lock a run has ended in order, or is of a version that had none.
        """
        if self.locked:
            return "running"
        saved = self.checkpoints[-1].step if self.checkpoints else None
        if self.max_steps is not None and saved is not None and saved >= self.max_steps:
            return "done"
        if self.locked is False or (self.events and self.events[-1].text.startswith(FAILED)):
            return "died"
        if was_autopsied(self.folder) or (self.events and self.events[-1].text.startswith(STOPPED)):
            return "stopped"
        age = self.age(now)
        if age is None:
            return "empty"
        if age < max(_PATIENCE, 10 * (self.seconds_per_step or 0)):
            return "running?"
        return "stopped" if saved is not None and saved == self.step else "died?"


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Return the folders of runs: each place itself, or the runs right below a folder that is none.

    Raises:
        DataError: a place does not exist, or is no run and holds none.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise DataError(f"{place} is no folder: expected the folder of a run, or a folder of runs")
        below = [place] if is_run(place) else sorted(filter(is_run, place.iterdir()))
        if not below and any(place.iterdir()):
            raise DataError(f"{place}: expected {CONFIG}, {METRICS} or checkpoints in it or right below it, found none")
        found += below or [place]  # an empty folder is a run that wrote nothing yet
    return list(dict.fromkeys(found))


def read_history(folder: Path, *, newest: bool = False) -> RunHistory:
    """Read a run's folder.

    Args:
        newest: read the end of metrics.jsonl only.
    """
    records, damaged = read_metrics(folder / METRICS, TAIL if newest else None)
    checkpoints = _read_checkpoints(folder)
    times = [_modified(folder / name) for name in (METRICS, CONFIG)] + [entry.written for entry in checkpoints]
    return RunHistory(
        folder=folder,
        config=_read_mapping(folder / CONFIG),
        preflight=_read_mapping(folder / PREFLIGHT),
        records=records,
        damaged=damaged,
        evaluations=read_metrics(folder / EVALUATIONS, TAIL if newest else None)[0],
        checkpoints=checkpoints,
        first_step=_read_first_step(checkpoints),
        events=read_events(folder),
        written=max((it for it in times if it is not None), default=None),
        locked=_is_locked(folder / LOCK),
    )


def read_metrics(path: Path, tail: int | None = None) -> tuple[list[Record], int]:
    """Return the metrics of every step, or its evaluation, and how many lines could not be read.

    Args:
        tail: read so many bytes at the end only; a line that they cut is left out.
    """
    try:
        with path.open("rb") as file:
            start = max(0, path.stat().st_size - tail) if tail is not None else 0
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
    except OSError:
        return [], 0
    records: dict[int, Record] = {}
    damaged = 0
    for line in lines:
        record = _parse(line)
        if record is None:
            damaged += bool(line.strip())
        else:
            records[int(record["step"])] = record
    return [records[step] for step in sorted(records)], damaged


def series(records: Iterable[Record], keys: Iterable[str]) -> list[tuple[int, float]]:
    """Return (step, value) of every record that has one of the keys, the first of them, with a finite number."""
    names = list(keys)
    found = ((record, next((name for name in names if name in record), "")) for record in records)
    return [(int(record["step"]), float(record[name])) for record, name in found if _is_finite(record.get(name))]


def heldout_losses(run: RunHistory) -> list[tuple[int, float]]:
    """Return (step, loss) of held-out questions under their documents' LoRAs, for every evaluation during the run."""
    return series(run.evaluations, [f"document_{key}" for key in loss_keys()])


def loss_keys() -> list[str]:
    """Return the keys that a task's loss can have in metrics.jsonl."""
    return [f"{name}{LOSS_SUFFIX}" for name in get_args(LossName)]


def peak_keys() -> list[str]:
    """Return the keys that the peak memory can have in metrics.jsonl."""
    return [f"cuda{PEAK_SUFFIX}", f"resident{PEAK_SUFFIX}"]


def speeds(records: Iterable[Record]) -> list[tuple[int, float]]:
    """Return (step, tokens a second); of lines without a speed it follows from tokens and seconds."""
    computed = [
        record
        if "tokens_per_second" in record
        or not _is_finite(record.get("seconds"))
        or not _is_finite(record.get("tokens"))
        else {**record, "tokens_per_second": record["tokens"] / max(record["seconds"], 1e-9)}
        for record in records
    ]
    return series(computed, ["tokens_per_second"])


def _parse(line: bytes) -> Record | None:
    """Return a line of metrics as a mapping with a step; None for anything else, such as a torn last line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_finite(record.get("step")) else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_mapping(path: Path) -> Record:
    """Read a YAML or JSON file that holds a mapping; empty where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_checkpoints(folder: Path) -> list[CheckpointEntry]:
    """List the complete checkpoints of a run by their steps, which are numbers; a run may remove one meanwhile."""
    found = []
    for place in step_folders(folder):
        step, written = step_of(place), _modified(place / MANIFEST)
        if step is not None and written is not None:
            found.append(CheckpointEntry(step, place, sum(map(_size, place.glob("*"))), written))
    return found


def _read_first_step(checkpoints: Sequence[CheckpointEntry]) -> dict[str, Record]:
    """Return the finite figures of the first step in the newest checkpoint, by `predicted` and `measured`."""
    found = _read_mapping(checkpoints[-1].folder / STATE).get(FIRST_STEP) if checkpoints else None
    parts = {name: found.get(name) for name in ("predicted", "measured")} if isinstance(found, dict) else {}
    return {
        name: {key: value for key, value in part.items() if _is_finite(value)}
        for name, part in parts.items()
        if isinstance(part, dict)
    }


def _is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock at a path; None without a lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # absent, or a file system without locks
        return None
    return False


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
