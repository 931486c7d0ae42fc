"""A whole run of ten steps, and the folder that it leaves: trained once, and written anew for each check that opens it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checks.training.staged_run import staged_trainer
from checks.training.steps import hypernet_values, shared

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

STEPS, KEPT = 10, 2  # the last two of a number of digits each: names that are not padded sort wrongly
PLAN = {"max_steps": STEPS, "save_steps": 9, "save_total_limit": KEPT, "gradient_accumulation_steps": 1}


@dataclass(frozen=True)
class KeptRun:
    """What the run left.

    Attributes:
        steps: how many it took.
        saved_before: whether anything was saved before the first one.
        weights: the hypernetwork's parameters by name at the end.
        kept: its checkpoints, oldest first, as paths in its folder.
        entries: what is in the folder, by path: times of access and change in nanoseconds, and a file's contents, what
            a link points to, or None of a folder.
    """

    steps: int
    saved_before: bool
    weights: dict[str, Tensor]
    kept: Sequence[Path]
    entries: "dict[Path, tuple[tuple[int, int], bytes | str | None]]"

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Write the run's folder, and remove it at the end."""
        with tempfile.TemporaryDirectory(prefix="d2l-") as place:
            folder = Path(place) / "run"
            folder.mkdir()
            for path, (_, contents) in self.entries.items():
                if contents is None:
                    (folder / path).mkdir()
                elif isinstance(contents, str):
                    (folder / path).symlink_to(contents)
                else:
                    (folder / path).write_bytes(contents)
            for path, (times, contents) in reversed(self.entries.items()):  # a folder's after those of what is in it
                if not isinstance(contents, str):
                    os.utime(folder / path, ns=times)
            yield folder


def kept_run(subject: "Subject") -> KeptRun:
    """Return the run, made once for all checks of a subject."""
    return shared(subject, "kept_run", lambda: _run(subject))


def other_trainer(subject: "Subject") -> "Stepper":
    """Make a trainer of the same plan that begins with other weights."""
    return staged_trainer(subject, (), seed=1, **PLAN)


def _run(subject: "Subject") -> KeptRun:
    train = subject.implementation.train
    trainer: Any = staged_trainer(subject, (), **PLAN)
    step = trainer.step
    saved: list[bool] = []  # before each step, whether anything was before the first one
    with tempfile.TemporaryDirectory(prefix="d2l-") as place:
        folder = Path(place)

        def counted() -> Any:
            saved.append(saved[0] if saved else any(path.is_dir() for path in folder.rglob("*")))
            return step()

        trainer.step = counted
        kept = [path.relative_to(folder) for path in train(trainer, folder)]
        entries = {path.relative_to(folder): _entry(path) for path in sorted(folder.rglob("*"))}
    return KeptRun(len(saved), bool(saved and saved[0]), hypernet_values(trainer.model), kept, entries)


def _entry(path: Path) -> tuple[tuple[int, int], bytes | str | None]:
    """Return times and contents of what a path names, see `KeptRun`."""
    found = path.lstat()
    times = found.st_atime_ns, found.st_mtime_ns
    if path.is_symlink():
        return times, os.readlink(path)
    return times, None if path.is_dir() else path.read_bytes()
