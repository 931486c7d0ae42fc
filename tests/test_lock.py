"""The lock of a folder: one holder, who is named, and it ends with its process."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2l.errors import CheckpointError
from d2l.io.lock import lock_folder
from d2l.io.run_folder import LOCK

HOLDER = """
import os, sys, time
from pathlib import Path
from d2l.io.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:  # a worker, as the preflight forks
        os.write(1, b"%d\\n" % os.getpid())  # whole lines: both processes write at once
        time.sleep(60)
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def test_one_holds_it_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    named = rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}: .*wait until"
    for _ in range(2):
        with lock_folder(tmp_path):
            with pytest.raises(CheckpointError, match=named), lock_folder(tmp_path):
                pytest.fail("locked twice")
            assert (tmp_path / LOCK).exists()
        assert not list(tmp_path.iterdir())


def test_one_who_only_looks_at_it_is_waited_for(tmp_path: Path) -> None:
    """As `d2l status` does."""
    with (tmp_path / LOCK).open("w") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        timer.start()
        with lock_folder(tmp_path):
            pass
        timer.join()


@pytest.mark.parametrize("forks", [False, True])
def test_it_ends_with_its_process_whatever_that_forked(tmp_path: Path, forks: bool) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), *["fork"][: int(forks)]]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    words = [holder.stdout.readline().strip() for _ in range(1 + forks)]
    workers = [int(word) for word in words if word != "held"]
    try:
        with pytest.raises(CheckpointError, match=rf"process {holder.pid} on "), lock_folder(tmp_path):
            pytest.fail("it is held")
        holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            pass
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_of_a_process_that_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    for text in ("", "{", '{"pid": 1, "host": "elsewhere"}'):
        (tmp_path / LOCK).write_text(text + "}" * 200)  # longer than what the next one writes
        with lock_folder(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_a_file_that_was_removed_meanwhile_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = __import__("fcntl").flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()  # by its last holder
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", remove_first)
    with lock_folder(tmp_path):
        assert len(calls) == 2
        with pytest.raises(CheckpointError), lock_folder(tmp_path):
            pytest.fail("locked twice")


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), lock_folder(tmp_path / "absent"):
        pytest.fail("there is none")
