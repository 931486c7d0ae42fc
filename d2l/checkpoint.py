"""Checkpoint folders: safetensors for tensors, JSON for the rest, a manifest of hashes written last.

A folder is written beside its final place and renamed, so a reader never sees half of one; a reader takes only a
folder whose manifest holds. Nothing is ever unpickled.

    step-000020/
        hypernet.safetensors    trained parameters (the reference's names)
        trainer.safetensors     optimizer moments and RNG states
        state.json              step, data position, scheduler, resolved config, fingerprint, versions
        manifest.json           file → bytes and sha256; its presence makes the folder a checkpoint
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2l.errors import CheckpointError
from d2l.io.atomic import require_absent, written_whole

MANIFEST = "manifest.json"
_HYPERNET, _TRAINER, _STATE = "hypernet.safetensors", "trainer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        hypernet: trained parameters by name.
        trainer: optimizer and RNG tensors by name; empty where the folder is only to be used, not continued.
        state: JSON values.
    """

    hypernet: Mapping[str, Tensor]
    trainer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: beside its place, hashed, renamed.

    Raises:
        CheckpointError: the folder exists, a value is no tensor or no JSON, a tensor is not finite, the disk is full.
    """
    require_absent(folder)
    _require_saveable(checkpoint, folder)
    with written_whole(folder, "checkpoint") as partial:
        save_file(_contiguous(checkpoint.hypernet), partial / _HYPERNET)
        save_file(_contiguous(checkpoint.trainer), partial / _TRAINER)
        (partial / _STATE).write_text(json.dumps(dict(checkpoint.state), indent=1, allow_nan=False), encoding="utf-8")
        names = (_HYPERNET, _TRAINER, _STATE)
        manifest = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in names
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after verifying it.

    Raises:
        CheckpointError: no manifest, or a file that is missing, changed or unreadable.
    """
    verify_checkpoint(folder)
    try:
        return Checkpoint(
            hypernet=load_file(folder / _HYPERNET),
            trainer=load_file(folder / _TRAINER),
            state=json.loads((folder / _STATE).read_text(encoding="utf-8")),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: naming the file, with expected and actual size or hash.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected {MANIFEST} in it, found none; "
            "pass a step-NNNNNN folder that a run wrote to the end"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; use an earlier checkpoint") from error
    for name in (_HYPERNET, _TRAINER, _STATE):
        if name not in expected:
            raise CheckpointError(f"{path} does not list {name}; use an earlier checkpoint")
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though the manifest lists it; use an earlier checkpoint")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: expected {size} bytes, found {file.stat().st_size}; use an earlier checkpoint"
            )
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file}: its content differs from what was written (sha256); use an earlier checkpoint"
            )


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest folder of a run whose manifest holds, and why newer ones were passed over."""
    refused = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            return folder, refused
    return None, refused


def find_checkpoint(place: Path) -> Path:
    """The checkpoint folder that a user's path stands for: itself, or the newest whole one of the run in that folder.

    Raises:
        CheckpointError: there is none; says why those found were passed over.
    """
    if place.name.startswith("step-") or (place / MANIFEST).is_file():
        return place
    folder, refused = newest_checkpoint(place)
    if folder is None:
        found = "\n".join(refused) or "found no checkpoint in it"
        raise CheckpointError(f"{place}: expected a run's folder or a step-NNNNNN folder; {found}")
    return folder


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints that this run wrote to the end."""
    complete = [folder for folder in sorted((run / "checkpoints").glob("step-*")) if (folder / MANIFEST).is_file()]
    for folder in complete[:-keep]:
        (folder / MANIFEST).unlink()  # first: a folder half removed must not pass for a checkpoint
        shutil.rmtree(folder)


def load_hypernet(hypernet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's parameters into a hypernetwork.

    Raises:
        CheckpointError: see `require_fitting`.
    """
    require_fitting(hypernet, tensors)
    hypernet.load_state_dict(tensors)


def require_fitting(hypernet: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's parameters with those of a hypernetwork, which may be on the meta device.

    Raises:
        CheckpointError: a parameter is missing, left over, or of another shape, and what that means.
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


def _require_saveable(checkpoint: Checkpoint, folder: Path) -> None:
    for part in (checkpoint.hypernet, checkpoint.trainer):
        for name, value in part.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"cannot write {folder}: {name} is a {type(value).__name__}, expected a tensor (put it in state.json)"
                )
    for name, value in checkpoint.hypernet.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"cannot write {folder}: {name} holds values that are not finite")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous copies on the CPU: safetensors refuses shared storage and strides."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
