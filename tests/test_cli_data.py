"""`d2l data needle`: the documents that the generator makes, in a new file or none at all."""

from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner, Result

import cli
from commands import data
from d2l.data import needles as needle
from d2l.data.records import read_records


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["data", "needle", *map(str, arguments)], prog_name="d2l")


def test_the_file_holds_the_requested_documents(tmp_path: Path) -> None:
    path = tmp_path / "needles.jsonl"
    options = {"--documents": 5, "--pairs": 3, "--digits": 1, "--filler-words": 8, "--seed": 7}
    arguments = [part for option in options.items() for part in option]
    result = d2l("-o", path, *arguments, "--style", "pairs", "--split", "heldout")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [f"data       {path}", "documents  5", "questions  15"]
    expected = needle.needle_records(5, 3, 1, 8, 7, "heldout", "pairs")
    found = read_records([path])
    assert [(it.context, it.prompts, it.responses) for it in found] == [
        (it.context, it.prompts, it.responses) for it in expected
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["needles.jsonl"]


def test_styles_and_splits_are_those_of_the_generator() -> None:
    assert get_args(data.Style) == get_args(needle.Style)
    assert get_args(data.Split) == get_args(needle.Split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--digits", "5"], "--digits"),
        (["--pairs", "0"], "--pairs"),
        (["--style", "poem"], "'sentences', 'pairs'"),
        (["--split", "test"], "'train', 'heldout'"),
        (["--pairs", "33", "--style", "pairs"], "33 is more than the 32 keys that exist"),
        # a digit has too few values for every key to have one in this split: this once never ended
        (["--pairs", "32", "--style", "pairs", "--digits", "1", "--split", "heldout"], "keys with 1-digit values"),
    ],
)
def test_impossible_requests_are_errors_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = d2l("-o", tmp_path / "needles.jsonl", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_no_file_is_written_over_and_a_folder_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    result = d2l("-o", path)
    assert (result.exit_code, path.read_text()) == (2, "mine")
    assert "never written over" in result.stderr
    result = d2l("-o", tmp_path / "absent" / "needles.jsonl")
    assert result.exit_code == 2
    assert "absent does not exist" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.jsonl"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2l.data.records.json.dumps", full)
    result = d2l("-o", tmp_path / "needles.jsonl")
    assert result.exit_code == 2
    assert f"cannot write {tmp_path / 'needles.jsonl'}: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_no_file_is_called_after_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = d2l("-o", "-")
    assert result.exit_code == 2
    assert "not to standard output" in result.stderr
    assert not list(tmp_path.iterdir())
