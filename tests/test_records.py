"""Reading and writing records: every format alike, and every unusable record named."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from d2l.build import load_records
from d2l.config.schema import RunConfig
from d2l.data.records import Record, read_records, write_records
from d2l.data.tables import Table
from d2l.errors import DataError

GOOD = {"context": "Rollo led the Normans.", "prompts": ["Who led?", "Whom?"], "responses": ["Rollo", "the Normans"]}
TEACHER = {"logprobs_vals": [[[-0.1, -3.0]], [[-0.2, -2.0]]], "logprobs_indices": [[[1, 2]], [[3, 4]]]}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def failure(*paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(paths)
    return str(caught.value)


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    values = [{**GOOD, **TEACHER, "title": "ignored"}, {**GOOD, **TEACHER, "context": "Ünï\u2028cöde\n"}]
    write_lines(tmp_path / "a.jsonl", *values)
    (tmp_path / "b.json").write_text(json.dumps(values, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "c.parquet")
    datasets.Dataset.from_list(values).save_to_disk(tmp_path / "d")

    for name in ("a.jsonl", "b.json", "c.parquet", "d"):
        records = read_records([tmp_path / name])
        assert [record.source for record in records] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]
        assert [vars(record) | {"source": ""} for record in records] == [
            {
                "context": value["context"],
                "prompts": ("Who led?", "Whom?"),
                "responses": ("Rollo", "the Normans"),
                "source": "",
                "logprobs_vals": (((-0.1, -3.0),), ((-0.2, -2.0),)),
                "logprobs_indices": (((1, 2),), ((3, 4),)),
            }
            for value in values
        ], name
        tables = [(record.logprobs_vals, record.logprobs_indices) for record in records]
        assert {type(table) for both in tables for each in both for table in each or ()} == {Table}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_gzipped_files_are_read(tmp_path: Path, name: str) -> None:
    text = json.dumps([GOOD, GOOD]) if name == "a.json.gz" else f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [record.source for record in read_records([tmp_path / name])] == [f"{tmp_path / name}:{i}" for i in (1, 2)]
    whole = gzip.compress(text.encode() * 1000, mtime=0)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert f"{tmp_path / name}: cannot be read as gzip" in failure(tmp_path / name)
    (tmp_path / name).write_text(text)
    assert "cannot be read as gzip: Not a gzipped file" in failure(tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes(whole)
    assert "is compressed by gzip; name it .jsonl.gz" in failure(tmp_path / "a.jsonl")


def test_a_glob_is_read_in_the_order_of_names_and_its_limit_holds_for_all_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write_lines(tmp_path / name, GOOD, GOOD)
    write_lines(tmp_path / "[x].jsonl", GOOD)  # a name that exists is no pattern
    read = [record.source.removeprefix(f"{tmp_path}/") for record in read_records([tmp_path / "[abc].jsonl"], limit=3)]
    assert read == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert len(read_records([tmp_path / "[x].jsonl"])) == 1
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_lines(tmp_path / "deep" / "er" / "d.jsonl", GOOD)
    assert len(read_records([tmp_path / "deep" / "**" / "*.jsonl"])) == 1


def test_what_names_no_file_is_told_apart(tmp_path: Path) -> None:
    assert f"{tmp_path / '*.jsonl'}: the pattern matches no file" in failure(tmp_path / "*.jsonl")
    assert "a.jsonl: does not exist" in failure(tmp_path / "a.jsonl")
    assert f"its folder {tmp_path / 'no'} does not exist" in failure(tmp_path / "no" / "where" / "a.jsonl")
    assert "-: standard input is not read" in failure(Path("-"))


def test_every_entry_of_train_ds_names_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", GOOD)
    names = [str(good), str(tmp_path / "b.jsonl"), "needle", str(tmp_path / "*.parquet")]
    with pytest.raises(DataError) as caught:
        load_records(RunConfig.model_validate({"train_ds_names": names}))
    message = str(caught.value)
    assert f"train_ds_names[1]: {tmp_path / 'b.jsonl'}: does not exist" in message
    assert f"train_ds_names[3]: {tmp_path / '*.parquet'}: the pattern matches no file" in message
    assert "train_ds_names[0]" not in message
    assert "--set 'train_ds_names=[]'" in message
    with pytest.raises(DataError, match=r"^train_ds_names\[0\] \(or --data\): "):
        load_records(RunConfig.model_validate({"train_ds_names": str(tmp_path / "b.jsonl")}))


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [record.source for record in read_records([tmp_path / "a.jsonl"])] == [
        f"{tmp_path / 'a.jsonl'}:1",
        f"{tmp_path / 'a.jsonl'}:4",
    ]
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(read_records([tmp_path / "b.json"])) == 1


def test_limit_holds_for_each_path_and_does_not_look_further(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, "{broken\n")
    assert len(read_records([path, path], limit=2)) == 4
    assert "line 3" in failure(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"context": "x" "prompts"}\n', "invalid JSON: Expecting ',' delimiter at column 17"),
        ("[" * 100_000 + "\n", "invalid JSON"),
        ('{"context": "x", "prompts": [], "context": "y"}\n', "invalid JSON: `context` is there twice"),
        (f'{{"context": {"9" * 5000}}}\n', "invalid JSON"),
        ([1], "expected an object, found list"),
        ({"text": "x", "title": "y"}, "`context` is missing (found: text, title)"),
        ({**GOOD, "context": None}, "`context` is missing"),
        ({**GOOD, "context": " \n\t"}, "`context` is empty"),
        ({**GOOD, "context": 3}, "`context` must be a string, found int '3'"),
        ({**GOOD, "context": "a\ud800"}, "half of a surrogate pair at character 2"),
        ({**GOOD, "prompts": "Who led?"}, "`prompts` must be a list of strings, found str"),
        ({**GOOD, "responses": ["Rollo", None]}, "`responses[1]` must be a string, found null"),
        ({**GOOD, "prompts": [], "responses": []}, "`prompts` is empty"),
        ({**GOOD, "responses": ["Rollo"]}, "2 prompts but 1 responses"),
        ({**GOOD, "responses": ["Rollo", " \n"]}, "`responses[1]` is blank: write what the model is to answer"),
        ({**GOOD, **TEACHER, "logprobs_indices": None}, "come together"),
        ({**GOOD, **TEACHER, "logprobs_vals": [[[-1.0]]]}, "an entry for each of the 2 prompts"),
    ],
)
def test_an_unusable_record_is_named_with_its_line(tmp_path: Path, line: object, expected: str) -> None:
    message = failure(write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD))
    assert f"{tmp_path / 'a.jsonl'}: 1 of 3 records cannot be used\n  line 2: " in message
    assert expected in message
    assert "expected: {" in message


def test_many_problems_of_many_files_come_in_one_short_message(tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", GOOD, *["{\n"] * 40)
    message = failure(bad, tmp_path / "absent.jsonl")
    assert "40 of 41 records" in message
    assert [f"line {number}:" in message for number in (2, 6, 7)] == [True, True, False]
    assert "and 35 more" in message
    assert "absent.jsonl: does not exist" in message
    assert len(message.splitlines()) < 20


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.jsonl", b'{"context": "caf\xe9"}', "line 1: not UTF-8 (byte 0xe9 at position 17)"),
        ("a.jsonl", b"PAR1\x00\x00", "is binary"),
        ("a.jsonl", '{"context": "x"}'.encode("utf-16"), "is binary"),
        ("a.json", b'{"context": "x"}', "expected one JSON list of records, found dict"),
        ("a.json", b'[{"context":\n }]', "Expecting value at line 2, column 2"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b"[3]", "item 1: expected an object"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_not_what_it_seems(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = failure(tmp_path / name)
    assert message.startswith(str(tmp_path / name))
    assert expected in message


def test_parquet_without_a_column_and_folders_that_are_no_dataset(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    assert "row 1: `context` is missing (found: text)" in failure(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    assert "empty: is a folder that `save_to_disk` of datasets did not write\nexpected:" in failure(tmp_path / "empty")
    write_lines(tmp_path / "empty" / "a.jsonl", GOOD)
    assert f"for its files name a glob: {tmp_path / 'empty' / '*.jsonl'}" in failure(tmp_path / "empty")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{}")
    assert "cannot be read as a dataset" in failure(tmp_path / "damaged")
    datasets.DatasetDict(train=datasets.Dataset.from_list([GOOD])).save_to_disk(tmp_path / "splits")
    assert f"name one of {tmp_path / 'splits' / 'train'}" in failure(tmp_path / "splits")
    assert len(read_records([tmp_path / "splits" / "train"])) == 1


def test_written_records_read_back_and_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        Record("Zoë\nq", ("p",), ("r",), f"{path}:1"),
        Record("b", ("p",), ("r",), f"{path}:2", (((-0.5,),),), (((7,),),)),
    ]
    write_records(path, records)
    assert read_records([path]) == records
    with pytest.raises(DataError, match="exists and is never written over"):
        write_records(path, records)
    with pytest.raises(DataError, match=r"the folder .*absent does not exist"):
        write_records(tmp_path / "absent" / "a.jsonl", records)


def test_the_real_documents_are_all_read(shared: Path) -> None:
    records = read_records([shared / "data" / "squad_sample.jsonl"])
    assert len(records) == 126
    assert records[0].prompts[0] == "In what country is Normandy located?"
    assert records[0].responses[0] == "France"
