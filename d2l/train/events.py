"""What happens to a run beside its steps: resumes are noted in its folder, checkpoints set aside and autopsies lie there."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2l.io.run_folder import AUTOPSY_FOLDER, EVENTS, RUN

STOPPED = "stopped after step"  # how the event of a run that was asked to stop begins
FAILED = "failed after step"  # and that of one that an error has ended, but for values that are not finite
_SUPERSEDED = "superseded-"


@dataclass(frozen=True)
class Event:
    """Something that happened: when, in seconds since 1970 (None: unknown), and what, in words."""

    time: float | None
    text: str


def note_event(folder: Path, text: str) -> None:
    """Append an event of now to the run's folder.

    Raises:
        OSError: the folder cannot be written.
    """
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3), "text": text}, ensure_ascii=False) + "\n")


def read_events(folder: Path) -> list[Event]:
    """Return all events of a run, by time; what has none comes first, and what cannot be read is left out."""
    found = [*_noted(folder), *_superseded(folder), *_autopsies(folder), *_changes(folder)]
    return sorted(found, key=lambda event: event.time or 0)


def was_autopsied(folder: Path) -> bool:
    """Return whether the run has stopped on a value that is not finite."""
    return any(True for _ in _autopsies(folder))


def _noted(folder: Path) -> Iterator[Event]:
    for line in _read(folder / EVENTS).splitlines():
        values = _mapping(line)
        if isinstance(text := values.get("text"), str):
            when = values.get("time")
            yield Event(float(when) if isinstance(when, int | float) else None, text)


def _superseded(folder: Path) -> Iterator[Event]:
    for place in folder.glob(f"checkpoints/{_SUPERSEDED}*"):
        name = place.name.removeprefix(_SUPERSEDED)
        yield Event(_modified(place), f"{name} was saved, and superseded: the run went on from an earlier checkpoint")


def _autopsies(folder: Path) -> Iterator[Event]:
    for place in folder.glob(f"{AUTOPSY_FOLDER}*"):
        if place.is_dir():
            yield Event(_modified(place), f"stopped on a value that is not finite: {place.name}")


def _changes(folder: Path) -> Iterator[Event]:
    """Yield what was changed on purpose at a resume."""
    changes = _mapping(_read(folder / RUN)).get("changes")
    for change in changes if isinstance(changes, list) else []:
        if isinstance(change, dict):
            step, field, was, now, reason = (change.get(key, "?") for key in ("step", "field", "was", "now", "reason"))
            yield Event(None, f"resumed after step {step} with another {field}: {was} → {now} ({reason})")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
