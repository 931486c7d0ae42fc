"""Checkpoint folders: safetensors for tensors, JSON for the rest, a manifest of hashes written last.

A folder is written beside its final place and renamed, and loaded only if its files match the manifest. Nothing is ever
unpickled.

    step-000020/
        hypernet.safetensors    trained parameters (the reference's names)
        trainer.safetensors     optimizer moments and RNG states
        state.json              step, data position, scheduler, resolved config, fingerprint, versions, first step's figures
        manifest.json           file → bytes and sha256; its presence makes the folder a checkpoint
"""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2l.errors import CheckpointError
from d2l.io.atomic import remove_folder, remove_leftovers, require_new_folder, write_new_folder
from d2l.io.run_folder import MANIFEST, STATE, checkpoints_folder, is_checkpoint, step_folders

_HYPERNET, _TRAINER = "hypernet.safetensors", "trainer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint folder.

    Attributes:
        hypernet: trained parameters by name.
        trainer: optimizer and RNG tensors by name; empty where the folder is only to be used, not continued.
        state: JSON values.
    """

    hypernet: Mapping[str, Tensor]
    trainer: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class FoundCheckpoint:
    """Checkpoint that is used.

    Attributes:
        folder: its folder.
        passed_over: why each newer one of its run is not used.
    """

    folder: Path
    passed_over: tuple[str, ...] = ()


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: beside its final place, with a manifest of hashes, then renamed.

    Raises:
        CheckpointError: the folder exists or cannot be written, a value is not a tensor or not JSON, or a tensor is not
            finite.
    """
    require_new_folder(folder)
    write_snapshot(folder, take_snapshot(checkpoint))


def take_snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint to the host's memory: what trains may change from then on, and so may its state.

    Raises:
        CheckpointError: a value is not a tensor.
    """
    return Checkpoint(_copy(checkpoint.hypernet), _copy(checkpoint.trainer), deepcopy(dict(checkpoint.state)))


def write_snapshot(folder: Path, snapshot: Checkpoint) -> None:
    """Write what `take_snapshot` returned, in any thread.

    Raises:
        CheckpointError: the folder exists or cannot be written, the state is not JSON, or a tensor is not finite.
    """
    require_new_folder(folder)
    _require_finite(snapshot.hypernet, folder)
    with write_new_folder(folder, "checkpoint") as partial:
        save_file(dict(snapshot.hypernet), partial / _HYPERNET)
        save_file(dict(snapshot.trainer), partial / _TRAINER)
        (partial / STATE).write_text(json.dumps(snapshot.state, indent=1, allow_nan=False), encoding="utf-8")
        names = (_HYPERNET, _TRAINER, STATE)
        manifest = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in names
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, changed or unreadable.
    """
    verify_checkpoint(folder)
    try:
        return Checkpoint(
            hypernet=load_file(folder / _HYPERNET),
            trainer=load_file(folder / _TRAINER),
            state=json.loads((folder / STATE).read_text(encoding="utf-8")),
        )
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing or differs; the message names it, with expected and actual size or hash.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected {MANIFEST} in it, found none; "
            "pass a step-NNNNNN folder that a run wrote to the end"
        )
    if damage := _find_damage(folder):
        raise CheckpointError(f"{damage}; use an earlier checkpoint")


def _find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where every file is as the manifest says."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{path} is missing"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    for name in (_HYPERNET, _TRAINER, STATE):
        if name not in expected:
            return f"{path} does not list {name}"
    for name, (size, digest) in expected.items():
        file = folder / name
        try:
            if not file.is_file():
                return f"{file} is missing, though the manifest lists it"
            if file.stat().st_size != size:
                return f"{file}: expected {size} bytes, found {file.stat().st_size}"
            if _sha256(file) != digest:
                return f"{file}: its content differs from what was written (sha256)"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
    return None


def find_newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint folder of a run, and why each newer one was rejected."""
    rejected: list[str] = []
    for folder in reversed(step_folders(run)):
        damage = _find_damage(folder)
        if damage is None:
            return folder, rejected
        rejected.append(damage)
    return None, rejected


def find_checkpoint(place: Path) -> FoundCheckpoint:
    """Return the checkpoint at a path: the path itself, or the newest valid checkpoint of the run in that folder.

    Raises:
        CheckpointError: there is none; the message gives the reason for each folder that was rejected.
    """
    if is_checkpoint(place):
        return FoundCheckpoint(place)
    folder, rejected = find_newest_checkpoint(place)
    if folder is None:
        found = "\n".join(rejected) or "found no checkpoint in it"
        raise CheckpointError(f"{place}: expected a run's folder or a step-NNNNNN folder; {found}")
    return FoundCheckpoint(folder, tuple(rejected))


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints of a run, and what killed writers left beside them.

    What is incomplete and older goes too. Links stay, and so does what they point to. Only for the one who writes the run.

    Raises:
        OSError: a folder cannot be renamed.
    """
    folders = [folder for folder in step_folders(run) if not folder.is_symlink()]
    complete = [folder for folder in folders if (folder / MANIFEST).is_file()]
    if complete:
        oldest = complete[-keep:][0]
        for folder in folders[: folders.index(oldest)]:
            remove_folder(folder)
    remove_leftovers(checkpoints_folder(run), only_writer=True)


def load_hypernet(hypernet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's parameters into a hypernetwork.

    Raises:
        CheckpointError: see `require_matching_parameters`.
    """
    require_matching_parameters(hypernet, tensors)
    hypernet.load_state_dict(tensors)


def require_matching_parameters(hypernet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's parameters with those of a hypernetwork, which may be on the meta device.

    Raises:
        CheckpointError: a parameter is missing, unexpected, or of another shape.
    """
    own = hypernet.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if missing or unexpected or other:
        name = (other or missing or unexpected)[0]
        found = list(tensors[name].shape) if name in tensors else "none"
        expected = list(own[name].shape) if name in own else "none"
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} parameters missing, {len(unexpected)} left over, "
            f"{len(other)} of another shape; {name}: expected {expected}, found {found}; use the config it was made with"
        )


def _require_finite(hypernet: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse trained parameters that are not finite."""
    for name, value in hypernet.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"cannot write {folder}: {name} holds values that are not finite")


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous: safetensors refuses shared storage and strides."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"cannot save {name}: it is a {type(value).__name__}, expected a tensor (put it in state.json)"
            )
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
