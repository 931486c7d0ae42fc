"""Output folders and files: written beside their place and renamed, so that nobody sees half of one; never written over."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2l.errors import CheckpointError, DataError


def require_absent(folder: Path) -> None:
    """Refuse a place that is taken, empty folders included.

    Raises:
        CheckpointError: something is there.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists and is never written over: remove it or choose another folder")


@contextmanager
def written_whole(folder: Path, what: str) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which takes its place when the block ends without an error.

    Args:
        what: what is written, as messages call it.

    Raises:
        CheckpointError: the place is taken, or writing failed; nothing is left behind.
    """
    require_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write the {what} {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new_file(path: Path) -> None:
    """Refuse a place that is taken, or whose folder does not exist.

    Raises:
        DataError: which of both.
    """
    if path.exists():
        raise DataError(f"{path} exists and is never written over: remove it or choose another name")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist: make it or choose another name")


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """Yields the name of a new file beside `path`, which takes its place when the block ends without an error.

    Raises:
        DataError: the place is taken, or writing failed; nothing is left behind.
    """
    require_new_file(path)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        require_new_file(path)  # it may have come meanwhile
        partial.rename(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        partial.unlink(missing_ok=True)
