"""Autopsies: what the folder that a refused step leaves holds, the newest of a run, and reading one, without torch.

autopsy/
    autopsy.json         the guard, the suspects, what each record does alone, values on the way, the command
    batch.json           records, chunks and queries of this process's micro-batches
    batch.safetensors    their tensors, as `0.input_ids`
    random.safetensors   random state before the step
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from d2l.errors import CheckpointError
from d2l.io.run_folder import AUTOPSY_FOLDER, is_run

AUTOPSY, BATCH, TENSORS, RANDOM = "autopsy.json", "batch.json", "batch.safetensors", "random.safetensors"


@dataclass(frozen=True)
class Values:
    """What a tensor holds: the range of its finite values (None where it has none), and the others.

    Attributes:
        nan, inf: how many there are.
        first: index of the first one, empty where all are finite.
    """

    low: float | None
    high: float | None
    nan: int = 0
    inf: int = 0
    first: tuple[int, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether every value is."""
        return not self.nan and not self.inf

    def __str__(self) -> str:
        """Return counts, first index and range, as messages have them."""
        span = "empty" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        if self.finite:
            return span
        kinds = [f"{count:,} {kind}" for kind, count in (("nan", self.nan), ("inf", self.inf)) if count]
        place = f", first at {list(self.first)}" if self.first else ""
        return f"{' and '.join(kinds)}{place}" + ("" if self.low is None else f"; else {span}")


@dataclass(frozen=True)
class Seen:
    """A tensor on the way: which part of the step, of which module (a name in the whole model), which of its tensors."""

    phase: str
    module: str
    tensor: str
    values: Values

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.phase}: {', '.join(filter(None, (self.module, self.tensor)))}: {self.values}"


@dataclass(frozen=True)
class Alone:
    """What a record of the step does when it is replayed by itself: its first tensor that is not finite, in one line."""

    record: int
    finite: bool
    first: str = ""


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
        alone: every record that was replayed by itself.
        trail: tensors up to the first one that is not finite, and a few behind it, in the order of the computation.
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
    alone: tuple[Alone, ...]
    trail: tuple[Seen, ...]
    checkpoint: str | None
    command: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def numbered(run: Path) -> Iterator[Path]:
    """Yield the folders of a run's autopsies, existing or not: the first one first."""
    yield run / AUTOPSY_FOLDER
    yield from (run / f"{AUTOPSY_FOLDER}-{number}" for number in count(2))


def newest_autopsy(run: Path) -> Path | None:
    """Return the folder of a run's newest autopsy; None where no step was refused.

    Raises:
        CheckpointError: the path is no run's folder.
    """
    if not is_run(run) and not (run / AUTOPSY_FOLDER).exists():
        what = "is no run's folder" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise CheckpointError(f"{run} {what}: expected the folder that `d2l train` wrote, or an autopsy in it")
    found = {_number(folder): folder for folder in run.glob(f"{AUTOPSY_FOLDER}*") if folder.is_dir()}
    return found[max(found)] if max(found, default=0) else None


def read_autopsy(folder: Path) -> Autopsy:
    """Read the facts of an autopsy.

    Raises:
        CheckpointError: the file is missing, or is not what an autopsy holds.
    """
    from pydantic import TypeAdapter, ValidationError  # late: the commands that need no autopsy start without it

    path = folder / AUTOPSY
    try:
        return TypeAdapter(Autopsy).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {AUTOPSY}: it is no autopsy, or was not written to the end") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path} is damaged: {place + ': ' if place else ''}{first['msg']}; the batch lies beside it in {TENSORS}"
        ) from None


def _number(folder: Path) -> int:
    """Return which autopsy a folder's name says, 0 where it is another folder's."""
    _, dash, number = folder.name.partition("-")
    if folder.name == AUTOPSY_FOLDER:
        return 1
    return int(number) if dash and folder.name.startswith(f"{AUTOPSY_FOLDER}-") and number.isdecimal() else 0
