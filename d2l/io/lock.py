"""Lock of a folder: one writer at a time. The system releases it when its process ends, however it ends."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2l.errors import CheckpointError
from d2l.io.run_folder import LOCK


class LockedError(CheckpointError):
    """Another process holds the lock."""


PATIENCE = 0.2  # seconds: whoever only looks whether a run goes on holds its lock for an instant

_held: set[int] = set()  # descriptors of the lock files that this process holds


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: a file in it that names this process, and is removed at the end.

    Raises:
        LockedError: another process holds it; the message names its pid and host.
        OSError: the folder is absent or cannot be written, or its file system has no locks.
    """
    path = folder / LOCK
    descriptor = _open_locked(path)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        if descriptor in _held:  # not in a forked process: the lock is its parent's
            path.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Open and lock a file, and return its descriptor."""
    until = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                if time.monotonic() < until:
                    time.sleep(PATIENCE / 10)
                    continue
                raise LockedError(
                    f"{path.parent} is in use by {_read_holder(path)}: a folder has one writer at a time; wait until "
                    "that process ends, stop it, or choose another folder"
                ) from None
            raise
        os.close(descriptor)  # its last holder removed the file between the two calls: once more


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> str:
    """Return the process that holds a lock, in words."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just been opened and names nobody yet
        return "another process"


def _close_in_fork() -> None:
    """Close a parent's locks in a forked process: they would outlive a parent that is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_fork)
