"""Atomic writing: complete or not at all, new outputs never written over, cache files replaced."""

import os
import re
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2l.errors import CheckpointError, DataError
from d2l.inference.cards import require_place_for_many, require_place_for_one
from d2l.inference.documents import Document
from d2l.io import atomic
from d2l.io.atomic import (
    remove_leftovers,
    replace_file,
    require_new_file,
    require_writable,
    write_new_file,
    write_new_folder,
)


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    path.write_text("old")
    with replace_file(path) as partial:
        assert partial.suffix == path.suffix
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_share_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    with replace_file(path) as first:
        first.write_text("first")
        with replace_file(path) as second:
            assert not second.exists()
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("new")
        raise KeyError

    with pytest.raises(KeyError), replace_file(path) as partial:
        fail(partial)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(DataError, match="never written over"), write_new_file(path):
        path.write_text("theirs")  # by another process, meanwhile
    assert path.read_text() == "theirs"
    with pytest.raises(DataError, match="never written over"), write_new_file(path):
        pytest.fail("the block was entered")
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_nothing_is_something(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("absent")
    with pytest.raises(DataError, match="never written over"), write_new_file(tmp_path / "link"):
        pytest.fail("the block was entered")
    with pytest.raises(CheckpointError, match="never written over"), write_new_folder(tmp_path / "link", "adapter"):
        pytest.fail("the block was entered")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(DataError, match=r"cannot write .*scores\.json: No space left"), write_new_file(path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "adapter"
    with write_new_folder(folder, "adapter") as partial:
        (partial / "a.txt").write_text("a")
        assert not folder.exists()
    assert (folder / "a.txt").read_text() == "a"
    with pytest.raises(CheckpointError, match="never written over"), write_new_folder(folder, "adapter"):
        pytest.fail("the block was entered")
    with pytest.raises(CheckpointError, match="cannot write the adapter"), write_new_folder(tmp_path / "b", "adapter"):
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "adapter", "a.txt"]


def record_syncs(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Record what is written through to the disk, and renamed, in its order."""
    calls: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(
            "/".join("partial" if ".partial-" in part else part for part in path.relative_to(root).parts) or "."
        )
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda path, target: calls.append("rename") or rename(path, target))
    monkeypatch.setattr(Path, "replace", lambda path, target: calls.append("rename") or replace(path, target))
    return calls


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_syncs(monkeypatch, tmp_path)
    with write_new_folder(tmp_path / "runs" / "adapter", "adapter") as partial:
        (partial / "a.txt").write_text("a")
    assert calls == [".", "runs/partial/a.txt", "runs/partial", "rename", "runs"]
    calls.clear()
    with replace_file(tmp_path / "metrics.jsonl") as partial:
        partial.write_text("a")
    assert calls == ["partial/metrics.jsonl", "rename", "."]


def test_leftovers_go_and_what_a_living_writer_writes_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    names = {
        "dead": f".a.partial-{host}-{dead.pid}-01234567",
        "former process of this number": f".a.partial-{host}-{os.getpid()}-01234567",
        "living": f".a.partial-{host}-{os.getppid()}-01234567",
        "elsewhere": f".a.partial-another-host-{dead.pid}-01234567",
        "old": ".a.partial-1234",
        "user's": ".a.partial-of my own",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    with replace_file(tmp_path / "own") as partial:
        own = partial.parent.name
        for alone, kept in ((False, ("living", "elsewhere", "old", "user's")), (True, ("user's",))):
            remove_leftovers(tmp_path, only_writer=alone)
            assert {path.name for path in tmp_path.iterdir()} == {own, *(names[key] for key in kept)}
        partial.touch()


def test_a_folder_that_cannot_be_synced_is_no_error_and_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()

    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    atomic.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        atomic.sync(tmp_path / "file")


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_what_is_written_is_for_the_umask_to_say(tmp_path: Path, umask: int, expected: int) -> None:
    """A library that writes for the owner alone, as safetensors 0.8.0 does, would keep a server of another user out."""
    before = os.umask(umask)
    try:
        with write_new_folder(tmp_path / "folder", "weights") as partial:
            save_file({"weight": torch.zeros(1)}, partial / "weights.safetensors")
            (partial / "run.sh").touch(0o755)
        with write_new_file(tmp_path / "weights.safetensors") as partial:
            save_file({"weight": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    for file in (tmp_path / "folder" / "weights.safetensors", tmp_path / "weights.safetensors"):
        assert file.stat().st_mode & 0o777 == expected
    assert os.access(tmp_path / "folder" / "run.sh", os.X_OK)


def test_permissions_that_are_right_are_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without permissions of its own may refuse to."""

    def refused(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    with write_new_file(tmp_path / "a.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "a.json").read_text() == "{}"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_new_file(tmp_path / "scores.json")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # tests may run as root
    with pytest.raises(DataError, match="cannot be written to: choose another one"):
        require_new_file(tmp_path / "scores.json")
    for require in (
        partial(require_place_for_one, document=Document("a", "a", "here", "text")),
        require_place_for_many,
    ):
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))} cannot be written to"):
            require(tmp_path / "adapters" / "a")
    (volume := tmp_path / "volume").mkdir()
    require_writable(volume)  # of others' folder it is one of ours
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is no folder"):
        require_writable(tmp_path / "file" / "a")
