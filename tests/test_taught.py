"""Teacher logprobs part by part: whatever interrupts, the file is that of an undisturbed call, and no part is done twice."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from d2l.data.records import Record, read_records, write_records
from d2l.errors import CheckpointError, DataError
from d2l.io.lock import lock_folder
from d2l.train import taught
from d2l.train.taught import divide, parts_folder, write_taught

MADE_BY = {"model": "a", "top_k": "2"}
RECORDS = [Record("x" * (7 + index), ("Why?", "Who?"), ("a", "bb"), f"data.jsonl:{index + 1}") for index in range(11)]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught, "CHARACTERS", 60)  # two or three records


class Teacher:
    """Stands in for the base, notes whom it was asked about, and may be interrupted before a part."""

    def __init__(self, parts: int = 1000) -> None:
        self.parts, self.asked = parts, list[str]()

    def __call__(self, records: Sequence[Record], *, on_progress: Callable[[int, int], None]) -> list[Record]:
        if self.parts == 0:
            raise KeyboardInterrupt
        self.parts -= 1
        self.asked += [record.source for record in records]
        on_progress(1, 2)
        on_progress(2, 2)
        tables = [(((-0.5, -1.0), (-0.1, -float(len(record.context)))), ((-2.0, -3.0),)) for record in records]
        ids = (((1, 2), (3, 4)), ((5, 6),))
        return [replace(it, logprobs_vals=own, logprobs_indices=ids) for it, own in zip(records, tables, strict=True)]


@pytest.fixture
def undisturbed(tmp_path: Path) -> bytes:
    """The file of a call that nothing disturbs, which leaves nothing beside it."""
    (tmp_path / "alone").mkdir()
    output, teacher = tmp_path / "alone" / "taught.jsonl", Teacher()
    assert write_taught(output, RECORDS, teacher, MADE_BY) == 0
    assert teacher.asked == [record.source for record in RECORDS]
    assert [*output.parent.iterdir()] == [output]
    return output.read_bytes()


def test_the_file_is_that_of_all_records_at_once(tmp_path: Path, undisturbed: bytes) -> None:
    write_records(tmp_path / "at_once.jsonl", Teacher()(RECORDS, on_progress=lambda done, total: None))
    assert undisturbed == (tmp_path / "at_once.jsonl").read_bytes()


def test_parts_hold_every_record_once_and_enough_characters() -> None:
    # of 2 * context + 11 characters each: 25, 27, 29 (81), 31, 33 (64), 35, 37 (72), 39, 41 (80), 43, 45 (88)
    assert [*divide(RECORDS)] == [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11)]
    assert [*divide(RECORDS[:4])] == [(0, 3), (3, 4)]
    assert [*divide(RECORDS[:1])] == [(0, 1)]


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_call_is_gone_on_from(tmp_path: Path, undisturbed: bytes, done: int) -> None:
    output, teachers = tmp_path / "taught.jsonl", [Teacher(done), Teacher(1), Teacher()]
    seen: list[tuple[int, int]] = []
    for teacher in teachers[:2]:
        with pytest.raises(KeyboardInterrupt):
            write_taught(output, RECORDS, teacher, MADE_BY)
        assert not output.exists()
    kept = write_taught(output, RECORDS, teachers[2], MADE_BY, lambda *shown: seen.append(shown))
    assert output.read_bytes() == undisturbed
    assert [source for teacher in teachers for source in teacher.asked] == [record.source for record in RECORDS]
    assert kept == len(RECORDS) - len(teachers[2].asked) > 0
    assert seen == sorted(seen)
    assert seen[-1] == (len(RECORDS), len(RECORDS))
    assert not parts_folder(output).exists()


def interrupted(folder: Path) -> Path:
    output = folder / "taught.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_taught(output, RECORDS, Teacher(2), MADE_BY)
    return output


@pytest.mark.parametrize(
    ("made_by", "named"), [({**MADE_BY, "model": "b"}, "model"), ({"model": "b", "top_k": "3"}, "model, top_k")]
)
def test_parts_of_another_teacher_are_refused_and_stay(tmp_path: Path, made_by: dict[str, str], named: str) -> None:
    output, teacher = interrupted(tmp_path), Teacher()
    before = {path: path.read_bytes() for path in parts_folder(output).iterdir()}
    with pytest.raises(DataError, match=f"taught.jsonl.parts holds parts of a teacher with another {named}: remove it"):
        write_taught(output, RECORDS, teacher, made_by)
    assert {path: path.read_bytes() for path in parts_folder(output).iterdir()} == before
    assert not teacher.asked


@pytest.mark.parametrize("text", ["[]", "{", "\xff"])
def test_parts_of_an_unknown_teacher_are_refused(tmp_path: Path, text: str) -> None:
    output = interrupted(tmp_path)
    (parts_folder(output) / "made_by.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"with another made_by\.json"):
        write_taught(output, RECORDS, Teacher(), MADE_BY)


@pytest.mark.parametrize("damage", ["cut", "other records", "fewer records"])
def test_a_part_of_other_records_is_refused_until_it_is_removed(
    tmp_path: Path, undisturbed: bytes, damage: str
) -> None:
    output = interrupted(tmp_path)
    part = parts_folder(output) / "part-00001.jsonl"
    text = part.read_text()
    lines = text.splitlines(keepends=True)
    part.write_text({"cut": text[:-9], "other records": text.replace("Why", "How"), "fewer records": lines[0]}[damage])
    with pytest.raises(DataError, match=r"part-00001.jsonl"):
        write_taught(output, RECORDS, Teacher(), MADE_BY)
    part.unlink()
    assert write_taught(output, RECORDS, Teacher(), MADE_BY) > 0
    assert output.read_bytes() == undisturbed


def test_nothing_is_written_over_and_two_do_not_write_the_same(tmp_path: Path) -> None:
    output, teacher = interrupted(tmp_path), Teacher()
    with lock_folder(parts_folder(output)), pytest.raises(CheckpointError, match="in use by process"):
        write_taught(output, RECORDS, teacher, MADE_BY)
    output.write_text("mine")
    with pytest.raises(DataError, match="never written over"):
        write_taught(output, RECORDS, teacher, MADE_BY)
    assert (output.read_text(), teacher.asked) == ("mine", [])
    output.unlink()
    shutil.rmtree(parts_folder(output))
    parts_folder(output).write_text("mine")
    with pytest.raises(DataError, match=r"taught.jsonl.parts: .*choose another place"):
        write_taught(output, RECORDS, teacher, MADE_BY)


@pytest.mark.parametrize("place", ["replace_file", "lock_folder", "remove_folder"])
def test_what_the_disk_refuses_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(taught, place, full)
    with pytest.raises(DataError, match=r"^cannot write .*taught.jsonl: .*parts.*: No space left on device; choose"):
        write_taught(tmp_path / "taught.jsonl", RECORDS, Teacher(), MADE_BY)


def test_written_tables_are_read_as_they_were(tmp_path: Path) -> None:
    output = tmp_path / "taught.jsonl"
    write_taught(output, RECORDS, Teacher(), MADE_BY)
    expected = Teacher()(RECORDS, on_progress=lambda done, total: None)
    assert [replace(it, source="") for it in read_records([output])] == [replace(it, source="") for it in expected]
    assert json.loads(output.read_text().splitlines()[0])["logprobs_indices"] == [[[1, 2], [3, 4]], [[5, 6]]]
