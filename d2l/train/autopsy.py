"""Autopsies: what the folder that a refused step leaves holds, the newest of a run, and reading one, without torch.

autopsy/
    autopsy.json         the guard, the suspects, what each record does alone, values on the way, the command
    batch.json           records, chunks and queries of this process's micro-batches
    batch.safetensors    their tensors, as `0.input_ids`
    random.safetensors   random state before the step
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from d2l.errors import CheckpointError

AUTOPSY, BATCH, TENSORS, RANDOM = "autopsy.json", "batch.json", "batch.safetensors", "random.safetensors"
NAME = "autopsy"  # of the folder; the next ones are autopsy-2, autopsy-3, ...


@dataclass(frozen=True)
class Suspect:
    """Where a value that is not finite came from.

    Attributes:
        phase: part of the step: data, document pass, hypernetwork, question pass, loss, backward pass, gradient norm,
            update, start.
        module: name in the whole model, such as `base.model.layers.3.mlp`; empty where it is none.
        tensor: which of its tensors: an output, a gradient, a weight, a moment.
        layer: of the base, where the tensor belongs to one.
        records: those that do it alone; empty where it is no record's doing, or where that is not known.
        what: values and circumstances, for people.
    """

    phase: str
    module: str
    tensor: str
    layer: int | None
    records: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        """Return one line."""
        layer = "" if self.layer is None or f"layers.{self.layer}" in self.module else f" of layer {self.layer}"
        place = ", ".join(filter(None, (self.module, f"{self.tensor}{layer}")))
        return f"{self.phase}: {place}: {self.what}"


@dataclass(frozen=True)
class Autopsy:
    """The contents of `autopsy.json`.

    Attributes:
        step: number of the step that was refused, or whose update was.
        guard: which guard fired, and its finding.
        rank, processes: of the process whose batch this is, and how many there are.
        records: those in its micro-batches.
        suspects: the first one first.
        replay: how the replay ended, in words.
        alone: a dict for every record that was replayed by itself: `record`, `finite`, and `first`, one line.
        trail: tensors up to the first one that is not finite, in the order of the computation, as `Seen.to_json`.
        checkpoint: newest checkpoint of the run whose hashes and values are sound, if any.
        command: what reproduces the failure.
        versions: of Python and libraries.
    """

    step: int
    guard: str
    finding: str
    rank: int
    processes: int
    records: tuple[int, ...]
    suspects: tuple[Suspect, ...]
    replay: str
    alone: Sequence[Mapping[str, Any]]
    trail: Sequence[Mapping[str, Any]]
    checkpoint: str | None
    command: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def numbered(run: Path) -> Iterator[Path]:
    """Yield the folders of a run's autopsies, existing or not: the first one first."""
    yield run / NAME
    yield from (run / f"{NAME}-{number}" for number in count(2))


def newest_autopsy(run: Path) -> Path | None:
    """Return the folder of a run's newest autopsy; None where no step was refused.

    Raises:
        CheckpointError: the path is no run's folder.
    """
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints", NAME)):
        what = "is no run's folder" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise CheckpointError(f"{run} {what}: expected the folder that `d2l train` wrote, or an autopsy in it")
    found = {_number(folder): folder for folder in run.glob(f"{NAME}*") if folder.is_dir()}
    return found[max(found)] if max(found, default=0) else None


def read_autopsy(folder: Path) -> Autopsy:
    """Read the facts of an autopsy.

    Raises:
        CheckpointError: the file is missing, or is not what an autopsy holds.
    """
    path = folder / AUTOPSY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        suspects = tuple(Suspect(**it | {"records": tuple(it["records"])}) for it in values["suspects"])
        autopsy = Autopsy(**values | {"suspects": suspects, "records": tuple(values["records"])})
        _require_types(autopsy)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {AUTOPSY}: it is no autopsy, or was not written to the end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}; the batch beside it can still be read"
        ) from None
    return autopsy


def _require_types(autopsy: Autopsy) -> None:
    """Refuse values that a reader could not print: JSON of any kind may lie in a file."""
    for line in (*autopsy.alone, *autopsy.trail, autopsy.versions):
        if not isinstance(line, dict):
            raise TypeError(f"expected objects, found {line!r:.40}")
    for row in autopsy.trail:
        if not isinstance(row["values"], dict):
            raise TypeError(f"expected values of a tensor, found {row['values']!r:.40}")


def _number(folder: Path) -> int:
    """Return which autopsy a folder's name says, 0 where it is another folder's."""
    _, dash, number = folder.name.partition("-")
    if folder.name == NAME:
        return 1
    return int(number) if dash and folder.name.startswith(f"{NAME}-") and number.isdecimal() else 0
