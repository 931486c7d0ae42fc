"""Atomic writing: complete or not at all, new outputs never written over, cache files replaced."""

from pathlib import Path

import pytest

from d2l.errors import CheckpointError, DataError
from d2l.io.atomic import replace_file, write_new_file, write_new_folder


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
