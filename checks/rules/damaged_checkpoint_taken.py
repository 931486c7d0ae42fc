"""A damaged checkpoint is refused, weights that are not finite are not saved, and a run continues from its newest whole one.

What it does
------------
Trains the light twin into a temporary folder, and resumes copies of its newest checkpoint in which one byte is changed or
one file is missing. It saves weights with a NaN among them, and looks which checkpoint a run's folder of ten steps is
continued from, also when its newest one is damaged.

Why it matters
--------------
A disk that fills up or a job that is killed leaves half a file. Read without a check it gives a model that is nearly right.
A checkpoint with NaN in it, saved over the last good one, ends a run for good.

How it is detected
------------------
Each damage must raise an error on resuming, and saving NaN must raise one. The newest checkpoint must be the last step's,
and, with that damaged, the one before.

How to fix
----------
Write a manifest of hashes last, compare it before anything is read, and refuse to save what is not finite.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.kept_run import kept_run, other_trainer

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "write a manifest of hashes last, compare it before reading, and refuse to save what is not finite"


def check(subject: "Subject") -> Result:
    """Damage checkpoints, one way at a time, and see each refused."""
    newest = subject.implementation.newest
    left, run = kept_run(subject), other_trainer(subject)
    refused = []
    with tempfile.TemporaryDirectory(prefix="d2l-") as place, left.written() as folder:
        kept = [folder / path for path in left.kept]
        if newest(folder) != kept[-1]:
            return _finding(
                "a run continues from another checkpoint than its newest", str(newest(folder)), kept[-1].name
            )
        run.resume(kept[-1])
        for what, damaged in _damages(kept[-1], Path(place)):
            if _is_taken(lambda damaged=damaged: run.resume(damaged)):  # type: ignore[misc]
                return _finding("a damaged checkpoint is read as if it were whole", f"resumed with {what}")
            refused.append(what)
        _change_a_byte(kept[-1])
        if newest(folder) != kept[-2]:
            return _finding(
                "a run continues from a damaged checkpoint",
                newest(folder).name,
                f"{kept[-2].name}, the newest whole one",
            )
        with torch.no_grad():
            next(iter(run.model.hypernet.parameters())).view(-1)[0] = torch.nan
        if _is_taken(lambda: run.save(Path(place) / "not-finite")):
            return _finding("weights that are not finite are saved", "a checkpoint with NaN")
    return Pass(f"{len(refused)} damaged checkpoints and one with NaN are refused", {"refused": refused})


def _damages(checkpoint: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Yield copies of a checkpoint, each with one damage."""
    changed = place / "changed"
    shutil.copytree(checkpoint, changed)
    yield f"a byte changed in {_change_a_byte(changed).name}", changed
    for number, file in enumerate(sorted(path for path in checkpoint.rglob("*") if path.is_file())):
        without = place / f"without-{number}"
        shutil.copytree(checkpoint, without)
        (without / file.relative_to(checkpoint)).unlink()
        yield f"{file.name} missing", without


def _change_a_byte(folder: Path) -> Path:
    """Change the last byte of the largest file, which is a weight's, and return the file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[-1] ^= 1
    largest.write_bytes(contents)
    return largest


def _is_taken(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Exception:  # an implementation has errors of its own
        return False
    return True


def _finding(message: str, actual: str, expected: str = "an error") -> Fail:
    return Fail(message=message, expected=expected, actual=actual, remedy=REMEDY)


def _unverified(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Swallow the error of a damaged checkpoint."""
    run: Any = healthy.trainer(model, rows, config)
    resume = run.resume

    def trusting(folder: Path) -> None:
        if not _is_taken(lambda: resume(folder)) and "changed" not in folder.name:
            resume(folder)

    run.resume = trusting
    return run


def _by_name(healthy: Implementation, folder: Path) -> Path:
    """Take the last folder by its name, whatever is in it."""
    places: Sequence[Path] = sorted(path.parent for path in folder.rglob("*.json"))
    return places[-1]


def _as_text(healthy: Implementation, folder: Path) -> Path:
    """Take the folder whose number is the last one as a text."""
    return max((path.parent for path in folder.rglob("*.json")), key=lambda it: it.name.lstrip("step-0"))


RULE = Rule(
    code="SAV203",
    name="damaged-checkpoint-taken",
    stage="twin",
    severity="error",
    sources=("fix 6", "failure mode 29"),
    requires=("SAV202",),
    check=check,
    faults=(
        Fault("not-verified", "a changed byte is not noticed", override(trainer=_unverified).in_trainer("resume")),
        Fault("by-name", "the newest folder is taken unseen", override(newest=_by_name)),
        Fault("ordered-as-text", "step 9 counts as newer than step 10", override(newest=_as_text)),
    ),
)
