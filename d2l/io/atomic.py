"""Atomic writing: a folder or file is written beside its final place and renamed, so that nobody reads half of one.

Outputs for the user are never written over (`write_new_folder`, `write_new_file`); a cache replaces its files
(`replace_file`).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2l.errors import CheckpointError, DataError


def require_new_folder(folder: Path) -> None:
    """Refuse a path that exists, empty folders included.

    Raises:
        CheckpointError: the path exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists and is never written over: remove it or choose another folder")


@contextmanager
def write_new_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a new folder beside `folder`; it is renamed to `folder` when the block ends without an error.

    Args:
        what: name of the contents in error messages, such as `checkpoint`.

    Raises:
        CheckpointError: the path exists, or writing failed; nothing is left behind.
    """
    require_new_folder(folder)
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
    """Refuse a path that exists, or whose folder does not.

    Raises:
        DataError: the message names which of the two; or the path is `-`, which would become a file of that name.
    """
    if str(path) == "-":
        raise DataError("the output goes to a file, not to standard output: name one")
    if path.exists():
        raise DataError(f"{path} exists and is never written over: remove it or choose another name")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist: make it or choose another name")


@contextmanager
def write_new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`; it is renamed to `path` when the block ends without an error.

    Raises:
        DataError: the path exists, or writing failed; nothing is left behind.
    """
    require_new_file(path)
    try:
        with replace_file(path) as partial:
            yield partial
            require_new_file(path)  # another process may have written it meanwhile
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, for this writer alone; it replaces `path` when the block ends.

    Where the block ends with an error, `path` stays as it was. The new file has the name of `path`, in a temporary
    folder: writers that choose a format by the suffix find it.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)
