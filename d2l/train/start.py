"""Where a run starts: in a new folder, or in the folder of a run, from the checkpoint that belongs to it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2l.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint
from d2l.config.load import saved_config
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError, ConfigError
from d2l.fingerprint import Fingerprint
from d2l.io.lock import lock_folder
from d2l.io.run_folder import checkpoints_folder, is_checkpoint, step_of
from d2l.train.changes import (
    allow,
    compare_configs,
    compare_inputs,
    other_versions,
    require_known,
)
from d2l.train.folder import Identity, named_writes, never_saved, read_identity, take_new_folder
from d2l.train.processes import from_main_process, processes, require_agreement


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's folder, locked.
        identity: which run it is, with the changes that are allowed now.
        source: folder of the checkpoint that it goes on from; None: it starts at the first step.
        checkpoint: what is in it.
        reasons: field → reason, for differences that are allowed.
        notes: what the user should know, a line each.
        inputs: what it trains on; None where nothing was hashed.
    """

    folder: Path
    identity: Identity
    source: Path | None = None
    checkpoint: Checkpoint | None = None
    reasons: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    inputs: Fingerprint | None = None

    @property
    def step(self) -> int:
        """Return the number of steps taken before."""
        return 0 if self.checkpoint is None else int(self.checkpoint.state["step"])

    def evidence(self) -> dict[str, Any]:
        """Return what every checkpoint keeps about the run, as JSON values."""
        inputs = {} if self.inputs is None else {"inputs": self.inputs.to_json()}
        return {"run": self.identity.to_json(), **inputs}


@contextmanager
def start_new(config: RunConfig, *, numbered: bool) -> Iterator[Start]:
    """Yield a start in a new folder, locked meanwhile; where nothing comes into the folder it is removed.

    The main process chooses for all.

    Args:
        numbered: take the next free `NAME-2`, `NAME-3`, … where the configured folder is in use; else refuse it.

    Raises:
        CheckpointError: the folder is in use and `numbered` is off, or it cannot be made or written.
    """
    with ExitStack() as held:
        yield from_main_process(
            lambda: Start(take_new_folder(Path(config.output_dir), held, numbered=numbered), Identity.new())
        )


@contextmanager
def start_resumed(config: RunConfig, place: Path, reasons: Mapping[str, str] | None = None) -> Iterator[Start]:
    """Yield the start from a run's newest valid checkpoint, or from the one named, in the folder of its run, locked meanwhile.

    A run that stopped before its first checkpoint starts over. One that has all its steps is not compared with anything:
    there is nothing to do.

    Args:
        place: a run's folder, or a checkpoint in one.
        reasons: field → reason, for differences that are allowed; see `d2l.train.changes`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged or no part of the run in that folder, another process trains
            there, or it was made with another configuration.
    """
    require_known(reasons or {})
    with ExitStack() as held:
        start = from_main_process(lambda: _find(place, held))
        if start.source is None:
            yield start
            return
        checkpoint = load_checkpoint(start.source)
        start = replace(start, checkpoint=checkpoint, reasons=reasons or {})
        start = replace(start, identity=_own_identity(start))
        yield start if start.step >= config.max_steps else _with_config(start, config)


def with_inputs(start: Start, now: Fingerprint | None) -> Start:
    """Return the start with what it trains on, compared with what its checkpoint was trained on.

    Args:
        now: None where nothing was hashed: nothing is compared.

    Raises:
        CheckpointError: data or base differ, and that is not allowed.
        ProcessError: they differ among the processes of the run.
    """
    start = replace(start, inputs=now)
    if now is not None:
        require_agreement(now.parts, "configuration, data, base or versions")
    if start.checkpoint is None or now is None:
        return start
    then = start.checkpoint.state.get("inputs")
    if then is None:
        note = (
            f"{start.source} holds no fingerprints of its data and base (of an earlier version): they are not compared"
        )
        return replace(start, notes=(*start.notes, note))
    heading = f"{start.source} was made with other data or another base:"
    earlier = start.identity.changes
    changes = (*earlier, *allow([*compare_inputs(then, now)], start.reasons or {}, earlier, start.step, heading))
    unused = [
        f"--allow-change {it}: it is as it was" for it in start.reasons or {} if it not in {c.field for c in changes}
    ]
    notes = (*start.notes, *other_versions(then, now), *unused)
    return replace(start, identity=replace(start.identity, changes=changes), notes=notes)


def _find(place: Path, held: ExitStack) -> Start:
    """Find the checkpoint to resume, and lock its run's folder."""
    folder = Path(os.path.abspath(place))
    if is_checkpoint(folder):
        folder = folder if _is_in_a_run(folder) else folder.resolve()  # a link to it
        run = folder.parent.parent
        if not _is_in_a_run(folder):
            _refuse_outside_of_a_run(place)
        _lock(run, held)
        return Start(run, _identity_of(run), folder)
    if not never_saved(folder) and not checkpoints_folder(folder).is_dir():
        raise CheckpointError(
            f"{place}: expected a run's folder or a step-NNNNNN folder in one; found no checkpoint in it"
        )
    _lock(folder, held)
    newest, rejected = find_newest_checkpoint(folder)
    if newest is not None:
        notes = tuple(f"passed over a newer checkpoint: {reason}" for reason in rejected)
        return Start(folder, _identity_of(folder), newest, notes=notes)
    if never_saved(folder):
        note = f"{place} was stopped before its first checkpoint was complete: it starts over"
        return Start(folder, _identity_of(folder), notes=(note,))
    found = "\n".join(rejected) or "found no checkpoint in it"
    raise CheckpointError(f"{place}: no checkpoint to go on from; {found}")


def _is_in_a_run(folder: Path) -> bool:
    return step_of(folder) is not None and folder.parent == checkpoints_folder(folder.parent.parent)


def _refuse_outside_of_a_run(place: Path) -> None:
    """Refuse a checkpoint that lies elsewhere than a run puts it.

    Raises:
        CheckpointError: always; the message says what to do.
    """
    if not load_checkpoint(place).trainer:
        raise CheckpointError(f"{place} holds a trained model, but no run to continue: it was imported")
    raise CheckpointError(
        f"{place} lies outside of its run: expected RUN/checkpoints/step-NNNNNN; to continue its run: --resume RUN; "
        f"{_FROM_A_COPY}"
    )


_FROM_A_COPY = (
    "to go on from a copy, give it a folder of its own: mkdir -p NEW/checkpoints, cp -r it to "
    "NEW/checkpoints/step-NNNNNN, then --resume NEW"
)


def _own_identity(start: Start) -> Identity:
    """Return the identity of the run to which a start's checkpoint belongs.

    A folder without one, made by an earlier version or for a copied checkpoint, takes over that of its checkpoint.

    Raises:
        CheckpointError: it is that of another run, or there is no run to continue.
    """
    assert start.checkpoint is not None
    state = start.checkpoint.state
    if not start.checkpoint.trainer:
        raise CheckpointError(f"{start.source} holds a trained model, but no run to continue: it was imported")
    own = read_identity(start.folder)
    theirs = Identity.of(state["run"]) if "run" in state else None
    linked = own is None and checkpoints_folder(start.folder).is_symlink()
    if theirs is not None and (linked or (own is not None and own.id != theirs.id)):
        found = "no run" if own is None else f"run {own.id[:8]}"
        raise CheckpointError(
            f"{start.source} belongs to run {theirs.id[:8]}, and {start.folder} is the folder of {found}; to continue its "
            f"run: --resume RUN, with its own folder; {_FROM_A_COPY}"
        )
    return own or theirs or start.identity


def _with_config(start: Start, config: RunConfig) -> Start:
    """Return the start with the changes of its configuration that are allowed."""
    assert start.checkpoint is not None
    state = start.checkpoint.state
    try:
        then = saved_config(dict(state["config"]))
    except ConfigError as error:
        problems = [f"  {problem}" for problem in error.problems]
        raise CheckpointError(
            "\n".join([f"{start.source}: its configuration is of another version:", *problems])
        ) from None
    differences = [*compare_configs(then, config, state, processes().num_processes)]
    earlier = start.identity.changes
    heading = f"{start.source} was made with another configuration:"
    new = allow(differences, start.reasons or {}, earlier, start.step, heading)
    return replace(start, identity=replace(start.identity, changes=(*earlier, *new)))


def _identity_of(folder: Path) -> Identity:
    return read_identity(folder) or Identity.new()


def _lock(folder: Path, held: ExitStack) -> None:
    with named_writes(folder, "make it writable, or resume a copy of the whole folder"):
        held.enter_context(lock_folder(folder))
