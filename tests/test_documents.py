"""Documents of files, folders and JSONL: ids that are safe, unique and stable, and what is wrong with each."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2l.inference import documents
from d2l.inference.documents import count_documents, is_single, read_documents

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name.strip())


def write_jsonl(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return path


def read(*places: Path, known: dict[str, str] | None = None) -> dict[str, str | None]:
    return {document.id: document.problem for document in read_documents([*map(str, places)], known)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAMES, max_size=8, unique=True))
def test_ids_are_safe_unique_and_the_same_in_the_next_run(tmp_path: Path, ids: list[str]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", *({"id": it, "context": "text"} for it in ids))
    found = list(read_documents([str(path)]))
    assert len({document.id.casefold() for document in found}) == len(ids)
    for document in found:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", document.id)
        assert document.id != "index.jsonl"
        assert document.problem is None
    known = {document.name: document.id for document in found}
    reordered = read_documents([str(write_jsonl(path, *({"id": it, "context": "text"} for it in ids[::-1])))], known)
    assert {document.name: document.id for document in reordered} == known


def test_a_folder_is_read_whole_hidden_files_apart(tmp_path: Path) -> None:
    for name in ("b.md", "a/c d.txt", ".hidden", ".git/x.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert read(tmp_path) == {"a-c-d": None, "b": None}
    assert count_documents([str(tmp_path)]) == 2


def test_an_id_stays_when_a_file_that_wants_it_is_added(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (first,) = read_documents([str(tmp_path)])
    (tmp_path / "a.doc").write_text("text")
    ids = {document.name: document.id for document in read_documents([str(tmp_path)], {first.name: first.id})}
    assert ids["a.md"] == "a"
    assert re.fullmatch(r"a-[0-9a-f]{8}", ids["a.doc"])


def test_two_files_of_one_name_are_two_documents_and_one_given_twice_is_one(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.md").write_text("text")
    files = (tmp_path / "x" / "a.md", tmp_path / "y" / "a.md", tmp_path / "x" / "a.md")
    assert len(read(*files)) == 2


def test_what_cannot_be_used_is_named_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 1000)
    contents = {"binary": b"\x89PNG", "empty": b" \n", "huge": b"x" * 1001, "good": b"text", "zeros": b"a\0b"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "lost").symlink_to(tmp_path / "absent")
    found = read(tmp_path)
    words = {"binary": "UTF-8", "empty": "is empty", "huge": "too large", "zeros": "zero byte", "lost": "No such file"}
    assert found.pop("good") is None
    assert found.keys() == words.keys()
    for name, problem in found.items():
        assert words[name] in str(problem)


def test_lines_of_jsonl_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 1000)
    lines = [
        b'{"context": "text", "id": 7}',
        b"{",
        b"[]",
        b"\xff",
        b'{"context": ""}',
        b'{"context": 1}',
        b'{"id": "x"}',
        b'{"context": "a\\u0000"}',
        b'{"context": "\\ud800"}',
        json.dumps({"context": "y" * 1001}).encode(),
        json.dumps({"context": "y" * 5000}).encode(),
        b'{"context": "other", "id": "7"}',
        b"",
        b'{"context": "last"}',
    ]
    path = tmp_path / "it.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = list(read_documents([str(path)]))
    assert [document.text for document in found if document.problem is None] == ["text", "last"]
    assert (found[0].id, found[-1].id, found[-1].source) == ("7", "it-000014", f"{path}:14")
    words = [
        "JSON",
        "list",
        "JSON",
        "empty",
        "int",
        "nothing",
        "zero",
        "surrogate",
        "too large",
        "too large",
        "earlier line",
    ]
    for document, word in zip(found[1:-1], words, strict=True):
        assert word in str(document.problem)
    assert count_documents([str(path)]) == 13


def test_a_gzipped_file_that_ends_early_keeps_what_was_read(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"context": f"text {i}" * 50}).encode() + b"\n" for i in range(400)))
    path = tmp_path / "it.jsonl.gz"
    path.write_bytes(whole)
    assert not any(read(path).values())
    path.write_bytes(whole[: len(whole) // 2])
    found = list(read_documents([str(path)]))
    assert "cannot be read after line" in str(found[-1].problem)
    assert len(found) > 1
    assert not any(document.problem for document in found[:-1])


def test_one_document_or_several(tmp_path: Path) -> None:
    assert is_single(["a.md"])
    assert is_single(["-"])
    assert not is_single(["a.md", "b.md"])
    assert not is_single(["a.jsonl.gz"])
    assert not is_single([str(tmp_path)])
