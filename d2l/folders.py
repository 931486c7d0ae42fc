"""Output folders: written beside their place and renamed, so that nobody ever sees half of one; never written over."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2l.errors import CheckpointError


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
