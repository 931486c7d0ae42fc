"""Atomic writing: a folder or file is written beside its final place and renamed, so that nobody reads half of one.

Outputs for the user are never written over (`write_new_folder`, `write_new_file`); what belongs to d2l is replaced
(`replace_file`). Contents reach the disk before the new name does, and the name before the call returns: a loss of power
leaves one or the other. What a killed writer leaves has a name of its own, and `remove_leftovers` finds it.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from d2l.errors import CheckpointError, DataError

# .step-000003.partial-HOST-PID-1a2b3c4d; d2l 0.1.0 wrote neither host nor the letters
_PARTIAL = re.compile(r"\.partial-(?:(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]+|\w+)$")
_writing: set[Path] = set()  # what this process is writing


def require_new_folder(folder: Path) -> None:
    """Refuse a path that exists, empty folders and links to nothing included.

    Raises:
        CheckpointError: the path exists.
    """
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists and is never written over: remove it or choose another folder")


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or not be made, before the work for it is done.

    Raises:
        CheckpointError: the message names what is in the way.
    """
    place = folder.absolute()
    nearest = next(it for it in (place, *place.parents) if os.path.lexists(it))
    if not nearest.is_dir():
        raise CheckpointError(f"cannot write into {folder}: {nearest} is no folder; choose another place")
    if not os.access(nearest, os.W_OK):
        raise CheckpointError(f"cannot write into {folder}: {nearest} cannot be written to; choose another place")


@contextmanager
def write_new_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a new folder beside `folder`; it is renamed to `folder` when the block ends without an error.

    Args:
        what: name of the contents in error messages, such as `checkpoint`.

    Raises:
        CheckpointError: the path exists, or writing failed; nothing is left behind.
    """
    require_new_folder(folder)
    with _write_folder(folder, what, replaces=False) as partial:
        yield partial


@contextmanager
def replace_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a new folder beside `folder`; it takes the place of `folder`, where there is one, when the block ends.

    Only for what belongs to d2l. For a moment nothing has the name: two folders cannot be exchanged in one step everywhere.

    Args:
        what: name of the contents in error messages, such as `adapter`.

    Raises:
        CheckpointError: writing failed; `folder` stays as it was.
    """
    with _write_folder(folder, what, replaces=True) as partial:
        yield partial


@contextmanager
def _write_folder(folder: Path, what: str, *, replaces: bool) -> Iterator[Path]:
    try:
        make_folders(folder.parent)
        with scratch_folder(folder) as partial:
            yield partial
            for path in partial.rglob("*"):
                _let_others_read(path)
                sync(path)
            sync(partial)
            if replaces and folder.exists():
                remove_folder(folder)
            partial.rename(folder)
            sync(folder.parent)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the {what} {folder}: {error}") from error


def require_new_file(path: Path) -> None:
    """Refuse a path that exists, links to nothing included, or whose folder does not, or cannot be written to.

    Raises:
        DataError: the message names which; or the path is `-`, which would become a file of that name.
    """
    if str(path) == "-":
        raise DataError("the output goes to a file, not to standard output: name one")
    if os.path.lexists(path):
        raise DataError(f"{path} exists and is never written over: remove it or choose another name")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist: make it or choose another name")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: the folder {path.parent} cannot be written to: choose another one")


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
    with scratch_folder(path) as folder:
        partial = folder / path.name
        yield partial
        _let_others_read(partial)
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def _let_others_read(path: Path) -> None:
    """Give a file as many permissions as the user's umask left its folder; safetensors 0.8.0 writes for the owner alone."""
    if path.is_file():
        mode = path.stat().st_mode
        wanted = mode | path.parent.stat().st_mode & 0o666
        if wanted != mode:  # file systems without permissions of their own may refuse to set them
            path.chmod(wanted)


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents, and return those that were absent, innermost first.

    Raises:
        OSError: one of them is a file or cannot be made.
    """
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(absent):
        sync(place.parent)
    return absent


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first: half of one never stands under its name, and a leftover is found.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = _partial_place(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, *, only_writer: bool = False) -> None:
    """Remove what killed writers left in a folder, as far as it can be; what a living one writes stays.

    Args:
        only_writer: whether nothing but this process writes into the folder, as its lock guarantees. Otherwise what was
            begun on another host, whose processes cannot be asked, stays too.
    """
    for path in folder.glob(".*.partial-*"):
        match = _PARTIAL.search(path.name)
        if match and path not in _writing and (only_writer or _is_dead(match["host"], match["pid"])):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder beside a place, whose own name is free for what becomes of it; what is still there goes at the end.

    Raises:
        OSError: it cannot be made.
    """
    partial = _partial_place(place)
    _writing.add(partial)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _writing.discard(partial)


def _partial_place(place: Path) -> Path:
    """Return a path beside a place, which names its writer."""
    return place.with_name(f".{place.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}")


def _is_dead(host: str | None, pid: str | None) -> bool:
    """Return whether a process is known to have ended; one with the number of this process was an earlier one."""
    if pid is None or host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
