"""Teacher logprobs of many records, written part by part: an interruption costs one part, and memory holds one.

taught.jsonl.parts/          beside the output, until that is whole
    made_by.json             what decides the teacher's values; a part of another teacher is never taken
    part-00000.jsonl         records in order, with their teacher logprobs
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from d2l.data.records import Record, read_records, write_records
from d2l.errors import DataError
from d2l.io.atomic import remove_folder, replace_file, require_new_file, write_new_file
from d2l.io.lock import lock_folder

CHARACTERS = 4_000_000  # of a part, documents counted for each question: about a million tokens, minutes of a GPU
_MADE_BY = "made_by.json"


class Teach(Protocol):
    """Gives some records their teacher logprobs, as `add_teacher_logprobs` does."""

    def __call__(self, records: Sequence[Record], *, on_progress: Callable[[int, int], None]) -> Sequence[Record]: ...


def parts_folder(output: Path) -> Path:
    """Return the folder of the parts, beside the file that they become."""
    return output.with_name(f"{output.name}.parts")


def write_taught(
    output: Path,
    records: Sequence[Record],
    teach: Teach,
    made_by: Mapping[str, str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write records with their teacher logprobs to a new JSONL file, and go on from the parts of an interrupted call.

    Args:
        teach: called for every part that is not there.
        made_by: what decides the teacher's values, by name.
        on_progress: called with the number of records done, and of all.

    Returns:
        The number of records that an earlier call had done.

    Raises:
        DataError: the output exists, a part is of other records or of another teacher, or something cannot be written.
        LockedError: another process writes the same.
    """
    require_new_file(output)
    folder = parts_folder(output)
    with _writable(output):
        folder.mkdir(exist_ok=True)
    with _locked(folder, output):
        _require_same_teacher(output, made_by)
        parts = {folder / f"part-{number:05d}.jsonl": part for number, part in enumerate(divide(records))}
        kept = sum(len(range(*part)) for path, part in parts.items() if path.exists())
        for path, (start, stop) in parts.items():
            part = records[start:stop]
            if path.exists():
                _require_same_records(path, part)
            else:
                with _noting(folder, start, len(records)):
                    write_records(path, teach(part, on_progress=_within(on_progress, start, len(part), len(records))))
            on_progress(stop, len(records))
        _join(output, parts)
    with _writable(output):
        remove_folder(folder)
    return kept


def divide(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Yield the first record of each part and that of the next one; the same records are divided alike."""
    start = size = 0
    for index, record in enumerate(records):
        size += len(record.context) * len(record.prompts) + sum(map(len, (*record.prompts, *record.responses)))
        if size >= CHARACTERS or index == len(records) - 1:
            yield start, index + 1
            start, size = index + 1, 0


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """Turn what the disk refuses into one message."""
    try:
        yield
    except OSError as error:
        where = error.filename or parts_folder(output)
        raise DataError(f"cannot write {output}: {where}: {error.strerror or error}; choose another place") from error


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Hold the folder's lock; of errors in this context, only those of taking it are the disk's."""
    with ExitStack() as held:
        with _writable(output):
            held.enter_context(lock_folder(folder))
        yield


def _require_same_teacher(output: Path, made_by: Mapping[str, str]) -> None:
    """Note beside the parts what decides their values, or refuse parts of another teacher."""
    folder = parts_folder(output)
    path = folder / _MADE_BY
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        others = [name for name in made_by if earlier.get(name) != made_by[name]] if path.exists() else []
    except (OSError, ValueError, AttributeError):
        others = [_MADE_BY]
    if others:
        raise DataError(
            f"{folder} holds parts of a teacher with another {', '.join(others)}: remove it to begin anew, or name "
            "another output"
        )
    with _writable(output), replace_file(path) as partial:
        partial.write_text(json.dumps(dict(made_by), indent=1), encoding="utf-8")


def _require_same_records(path: Path, records: Sequence[Record]) -> None:
    """Refuse a part of other records, or one that cannot be read."""
    found = [replace(it, logprobs_vals=None, logprobs_indices=None, source="") for it in read_records([path])]
    if found != [replace(it, logprobs_vals=None, logprobs_indices=None, source="") for it in records]:
        raise DataError(f"{path} holds other records than the data: remove it, and it is made again")


@contextmanager
def _noting(folder: Path, done: int, total: int) -> Iterator[None]:
    """Where a part is interrupted, note what is kept."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note(f"{done:,} of {total:,} documents are in {folder}: the same command goes on")
        raise


def _join(output: Path, parts: Iterable[Path]) -> None:
    """Write the parts one after the other to a new file."""
    with write_new_file(output) as partial, partial.open("xb") as file:
        for path in parts:
            with path.open("rb") as lines:
                shutil.copyfileobj(lines, file)


def _within(
    on_progress: Callable[[int, int], None], start: int, records: int, total: int
) -> Callable[[int, int], None]:
    """Return what turns the passes of a part into the records of all."""
    return lambda done, passes: on_progress(start + records * done // passes, total)
