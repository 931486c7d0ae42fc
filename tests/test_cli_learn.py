"""`d2l eval` from a run of one step: the table, the JSON, and what is refused before anything is loaded."""

import json
from pathlib import Path

import pytest
from tiny_run import make_run
from typer.testing import CliRunner, Result

import cli
from cli_learn import LABELS
from d2l.data.needle import needle_records
from d2l.data.records import write_records


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_records(tmp_path / "needles.jsonl", needle_records(3, 2, 2, 0, seed=1, split="heldout"))
    return tmp_path / "needles.jsonl"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments), "--max-new-tokens", "3"], prog_name="d2l")


def test_the_table_shows_every_condition_and_the_file_every_answer(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    result = evaluate(run_folder, "--data", data, "--limit", 2, "-o", tmp_path / "scores.json")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("2 documents, 4 questions")
    assert [next(label for label in LABELS.values() if line.startswith(label)) for line in lines[2:]] == list(
        LABELS.values()
    )
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert set(written["scores"]) == set(LABELS)
    assert len(written["answers"]) == 4 * 4


def test_what_cannot_be_done_is_said_in_one_message(run_folder: Path, data: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    result = evaluate(run_folder, "--data", data, "-o", taken)
    assert (result.exit_code, taken.read_text()) == (2, "mine")
    assert "exists and is never written over" in result.stderr
    one = tmp_path / "one.jsonl"
    write_records(one, needle_records(1, 2, 2, 0, seed=1))
    result = evaluate(run_folder, "--data", one)
    assert result.exit_code == 2
    assert "at least two different documents" in result.stderr
