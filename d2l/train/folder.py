"""A run's folder: taking a new one, its lock, who the run is, and making it ready for the next step."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError, ConfigError
from d2l.io.atomic import make_folders, remove_leftovers, replace_file
from d2l.io.lock import LockedError, lock_folder
from d2l.io.run_folder import (
    CONFIG,
    EVALUATIONS,
    LOCK,
    METRICS,
    PREFLIGHT,
    RUN,
    checkpoints_folder,
    step_folders,
    step_of,
)


@dataclass(frozen=True)
class Change:
    """Difference from the run so far that its user allowed when resuming it.

    Attributes:
        step: the last step before it.
        field: a configuration key, or a part of the fingerprint.
        was, now: JSON values.
        reason: the user's.
    """

    step: int
    field: str
    was: Any
    now: Any
    reason: str


@dataclass(frozen=True)
class Identity:
    """Which run this is.

    Attributes:
        id: drawn when the run is first started; its folder and all its checkpoints hold it.
        changes: what was changed on purpose since, oldest first.
    """

    id: str
    changes: tuple[Change, ...] = ()

    @classmethod
    def new(cls) -> "Identity":
        """Draw the identity of a new run."""
        return cls(uuid4().hex)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Identity":
        """Make it from JSON values."""
        return cls(values["id"], tuple(Change(**change) for change in values["changes"]))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def take_new_folder(configured: Path, held: ExitStack, *, numbered: bool) -> Path:
    """Make and lock a new folder, and return it.

    Args:
        held: gives the lock back at its end, and removes the folder where it is still empty.
        numbered: take the next free `NAME-2`, `NAME-3`, … where the configured folder is in use; else refuse it.

    Raises:
        CheckpointError: the folder is in use and `numbered` is off, or it cannot be made or written.
    """
    for folder in _number_folders(configured) if numbered else [configured]:
        try:
            if _take(folder, held):
                return folder
        except LockedError:
            if not numbered:
                raise
    if not configured.is_dir():
        raise CheckpointError(f"{configured} is a file, and nothing is written over; choose another --output")
    raise CheckpointError(
        f"{configured} is not empty, and nothing is written over; choose another --output, "
        f"or continue the run in it with --resume {configured}"
    )


def _take(folder: Path, held: ExitStack) -> bool:
    """Make and lock a folder if it is free; return whether it was."""
    with named_writes(folder, "choose another --output"), ExitStack() as attempt:
        if not _is_free(folder):
            return False
        made = make_folders(folder)
        attempt.callback(_remove_empty, made)
        attempt.enter_context(lock_folder(folder))
        if not _is_free(folder):  # another process had it between the two calls
            return False
        held.enter_context(attempt.pop_all())
        return True


@contextmanager
def named_writes(folder: Path, advice: str) -> Iterator[None]:
    """Turn an error of the operating system into one that names the run's folder.

    Raises:
        CheckpointError: such an error.
    """
    try:
        yield
    except OSError as error:
        place = "" if error.filename in (None, str(folder)) else f": {error.filename}"
        raise CheckpointError(f"cannot write to {folder}{place}: {error.strerror or error}; {advice}") from error


def never_saved(folder: Path) -> bool:
    """Return whether a run started in this folder and stopped before its first checkpoint was complete."""
    metrics = folder / METRICS
    started = any((folder / name).is_file() for name in (RUN, CONFIG))
    return started and not step_folders(folder) and not (metrics.exists() and metrics.stat().st_size)


def read_identity(folder: Path) -> Identity | None:
    """Return who the run in a folder is; None where nothing says so, as in a folder of d2l 0.1.0.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / RUN
    if not path.exists():
        return None
    try:
        return Identity.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; its checkpoints hold the same under `run` in state.json: "
            "remove the file to have it written anew from the one that is resumed"
        ) from None


def prepare(
    folder: Path, config: RunConfig, identity: Identity, preflight: Mapping[str, Any], step: int | None
) -> None:
    """Make a run's folder ready for the step after `step`, or for a run that starts.

    What killed writers left is removed. Later checkpoints (damaged, or skipped by choice) are renamed; metrics of later
    steps are removed.

    Args:
        preflight: JSON values, kept from the run's first start.
        step: of the checkpoint that is resumed; None: the run starts.

    Raises:
        OSError: the folder cannot be written.
    """
    remove_leftovers(folder)
    remove_leftovers(checkpoints_folder(folder), only_writer=True)
    if step is not None:
        _rewind(folder, step)
    _write(folder / RUN, _as_text(identity.to_json()))
    if step is None or _read_config(folder) != config:
        _write(folder / CONFIG, config.to_yaml())
    if step is None or not (folder / PREFLIGHT).exists():
        _write(folder / PREFLIGHT, _as_text(preflight))


def _rewind(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps, and remove what metrics.jsonl and evaluation.jsonl say of them."""
    for later in step_folders(folder):
        if (step_of(later) or 0) > step:
            later.rename(next(filter(_is_free, _number_folders(later.with_name(f"superseded-{later.name}")))))
    for path in (folder / METRICS, folder / EVALUATIONS):
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            _write(path, "".join(line for line in lines if _is_of_step_up_to(step, line)))


def _is_of_step_up_to(step: int, line: str) -> bool:
    """Return whether a line of metrics.jsonl is complete and not of a later step."""
    try:
        return bool(json.loads(line)["step"] <= step) and line.endswith("\n")
    except (ValueError, KeyError, TypeError):
        return False


def _read_config(folder: Path) -> RunConfig | None:
    """Return the configuration in a run's folder; None where none can be read."""
    try:
        return load_config(folder / CONFIG)
    except ConfigError:
        return None


def _write(path: Path, text: str) -> None:
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _as_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False)


def _number_folders(place: Path) -> Iterator[Path]:
    """Yield `NAME`, `NAME-2`, `NAME-3`, …"""
    yield place
    yield from (place.with_name(f"{place.name}-{number}") for number in count(2))


def _is_free(folder: Path) -> bool:
    """Return whether a folder is absent or empty; a lock that nobody holds is nothing."""
    return not os.path.lexists(folder) or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def _remove_empty(made: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
