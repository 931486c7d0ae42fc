"""From a refused step to its autopsy: suspects, the folder, and one message that says what to do."""

import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch import Tensor

from d2l.checkpoint import load_checkpoint
from d2l.data.packing import PackedBatch
from d2l.errors import CheckpointError, NonFiniteError
from d2l.io.atomic import write_new_folder
from d2l.io.run_folder import CONFIG, PREFLIGHT, step_folders
from d2l.train.autopsy import AUTOPSY, BATCH, RANDOM, TENSORS, Autopsy, numbered
from d2l.train.guards import STATE, is_sound
from d2l.train.replay import BatchLoss
from d2l.train.suspects import Examination, RefusedRun, examine

_LIBRARIES = ("d2l-preflight", "torch", "transformers", "accelerate", "safetensors")


@contextmanager
def autopsy_on_refusal(run: RefusedRun, folder: Path, loss: BatchLoss) -> Iterator[None]:
    """Where a guard refuses a step in this context, write an autopsy into the run's folder and say more in the message.

    Guards decide by values of all processes, so all of them come here together. The first one whose replay fails as the
    step did writes; all of them raise the same message. One that fell out of step with the others writes by itself, and
    its end ends them.

    Args:
        run: the trainer.
        folder: the run's folder.
        loss: the run's own loss of a micro-batch.

    Raises:
        NonFiniteError: the one that was raised, with suspects, the autopsy's folder and the newest sound checkpoint.
    """
    try:
        yield
    except NonFiniteError as error:
        found = examine(run, error.guard, loss)
        several = run.processes.num_processes > 1 and not found.out_of_step
        guilty = gather_object([bool(found.suspects)]) if several else []
        writer = guilty.index(True) if any(guilty) else 0
        text = [str(error)]
        if run.processes.process_index == writer or found.out_of_step:
            text = [_write_and_describe(run, folder, error, found)]
        if several:
            broadcast_object_list(text, from_process=writer)
        raise NonFiniteError(text[0], error.guard, error.cause) from None


def _write_and_describe(run: RefusedRun, folder: Path, error: NonFiniteError, found: Examination) -> str:
    """Write the autopsy, and return the message."""
    checkpoint, rejected = newest_sound_checkpoint(folder)
    autopsy = _compose(run, folder, error, found, checkpoint)
    lines = [f"{_where(autopsy)}: {error.cause}"]
    lines += [f"first suspect: {autopsy.suspects[0]}"] if autopsy.suspects else [autopsy.replay]
    if len(autopsy.alone) > 1:
        guilty = [str(one.record) for one in autopsy.alone if not one.finite]
        which = f" ({', '.join(guilty)})" if len(guilty) < len(autopsy.alone) and guilty else ""
        lines.append(f"replayed one at a time, {len(guilty)} of {len(autopsy.alone)} records failed{which}")
    try:
        place = next(it for it in numbered(folder) if not it.exists())
        _write(place, run, autopsy)
    except CheckpointError as failure:
        lines.append(f"no autopsy: {failure}")
    else:
        lines.append(f"autopsy: {place} (`d2l autopsy {shlex.quote(str(folder))}` shows it)")
    lines += [f"not to be used: {reason}" for reason in rejected]
    if checkpoint is None:
        lines.append("no checkpoint of this run is sound: start a new run")
    else:
        lines.append(f"sound, by its hashes and by its values: {checkpoint}; to continue there: --resume {checkpoint}")
    return "\n".join(lines)


def _where(autopsy: Autopsy) -> str:
    """Return step, rank and records, as the message begins."""
    step = f"step {autopsy.step}"
    if autopsy.guard == STATE:
        step = f"after the update of {step}" if autopsy.step else "before the first step"
    rank = f", rank {autopsy.rank}" if autopsy.processes > 1 else ""
    guilty = autopsy.suspects[0].records if autopsy.suspects else ()
    names = ", ".join(map(str, guilty or autopsy.records))
    if guilty:
        return f"{step}{rank}, record{'s' if len(guilty) > 1 else ''} {names}"
    return f"{step}{rank} (records {names})" if names else f"{step}{rank}"


def _compose(
    run: RefusedRun, folder: Path, error: NonFiniteError, found: Examination, checkpoint: Path | None
) -> Autopsy:
    return Autopsy(
        step=run.step_number if error.guard == STATE or run.inputs is None else run.inputs.step,
        guard=error.guard,
        finding=error.cause,
        rank=run.processes.process_index,
        processes=run.processes.num_processes,
        records=tuple(record for batch in _own(run) for record in batch.record_ids),
        suspects=tuple(found.suspects),
        replay=found.replay,
        alone=tuple(found.alone),
        trail=tuple(found.trail),
        checkpoint=None if checkpoint is None else str(checkpoint),
        command=_command(folder, checkpoint, run.processes.num_processes),
        versions=_versions(),
    )


def _own(run: RefusedRun) -> Sequence[PackedBatch]:
    """Return the micro-batches of this process."""
    count, rank = run.processes.num_processes, run.processes.process_index
    return [] if run.inputs is None else run.inputs.batches[rank::count]


def _write(folder: Path, run: RefusedRun, autopsy: Autopsy) -> None:
    """Write the folder of an autopsy.

    Raises:
        CheckpointError: it exists or cannot be written.
    """
    facts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(_own(run)):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        held = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        tensors |= {f"{number}.{name}": x.contiguous() for name, x in held.items()}
        facts.append({name: x for name, x in values.items() if name not in held})
    with write_new_folder(folder, "autopsy") as partial:
        (partial / BATCH).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        save_file(tensors, partial / TENSORS)
        save_file(dict(run.inputs.random) if run.inputs else {}, partial / RANDOM)
        text = json.dumps(autopsy.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        (partial / AUTOPSY).write_text(text, encoding="utf-8")


def newest_sound_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return a run's newest checkpoint whose hashes and values are sound, and why each newer one is not.

    A checkpoint may be whole and still hold weights or moments that no step can start from.
    """
    rejected: list[str] = []
    for folder in reversed(step_folders(run)):
        try:
            checkpoint = load_checkpoint(folder)
        except CheckpointError as error:
            rejected.append(str(error))
            continue
        kept = {name: (x, False) for name, x in checkpoint.hypernet.items()}
        kept |= {name: (x, True) for name, x in checkpoint.trainer.items() if name.startswith("optimizer.")}
        bad = [name for name, (x, moment) in kept.items() if not is_sound(x, moment=moment)]
        if not bad:
            return folder, rejected
        size = float(kept[bad[0]][0].abs().amax())
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        rejected.append(f"{folder} holds {bad[0]} (largest value {size:.3g}){more}")
    return None, rejected


def _command(folder: Path, checkpoint: Path | None, processes: int) -> str:
    """Return the command that takes the same steps from the newest sound checkpoint, or from the start, once more."""
    program = ["d2l"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "cli"]
    again = ["--output", f"{folder}-again"] if checkpoint is None else ["--resume", str(checkpoint)]
    return shlex.join([*program, "train", str(folder / CONFIG), *again, *_ignored(folder / PREFLIGHT)])


def _ignored(preflight: Path) -> list[str]:
    """Return the options that let the findings pass that the run's own preflight let pass."""
    try:
        outcomes = json.loads(preflight.read_text(encoding="utf-8"))["outcomes"]
        codes = [outcome["code"] for outcome in outcomes if outcome["ignored"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [word for code in codes for word in ("--ignore", f"{code}=as in the run that stopped")]


def _versions() -> dict[str, str]:
    """Return the versions of Python, of libraries, and of CUDA and the GPU where there is one."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return versions
