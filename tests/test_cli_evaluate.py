"""`d2l eval` from a run of one step: tables, JSON and figure, on a terminal and elsewhere, and refusals before loading."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from commands.console import LOADING
from d2l.data.needles import needle_records
from d2l.data.records import Record, read_records, write_records
from d2l.evaluation.scores import LABELS
from d2l.io.run_folder import step_folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Documents of one and of two chunks."""
    records = needle_records(2, 2, 2, 0, seed=1, split="heldout") + needle_records(1, 1, 2, 90, seed=2, split="heldout")
    write_records(tmp_path / "needles.jsonl", records)
    return tmp_path / "needles.jsonl"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments), "--max-new-tokens", "1"], prog_name="d2l")


def test_tables_show_every_condition_and_size_and_the_file_every_answer(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    result = evaluate(run_folder, "--data", data, "-o", tmp_path / "scores.json", "--plot", tmp_path / "scores.svg")
    assert (result.exit_code, result.stderr) == (0, f"{LOADING}\ncheckpoint {step_folder(run_folder, 1)}\n")
    overall, lengths, chunks = (part.splitlines() for part in result.stdout.split("\n\n"))
    assert overall[0].startswith("3 documents, 5 questions")
    assert "ROUGE-L" in overall[1]
    assert "relative F1" in overall[1]
    assert overall[1].split()[-1] == "alike"
    assert [label for line in overall[2:] for label in LABELS.values() if line.startswith(label)] == [*LABELS.values()]
    assert lengths[0] == "exact match / F1 by document tokens"
    assert len(lengths) == 4
    assert [line.split()[:3] for line in chunks[2:]] == [["1", "2", "4"], ["2", "1", "1"]]
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert set(written["scores"]) == set(LABELS)
    assert [group["low"] for group in written["by_chunks"]] == [1, 2]
    shown = [f"{score['alike']:.2f}" for score in written["scores"].values()]  # of two documents with two answers each
    assert [line.split()[-1] for line in overall[2:]] == shown
    assert {(it["record"], it["query"]): it["expected"] for it in written["answers"]} == {
        (record, query): response
        for record, it in enumerate(read_records([data]))
        for query, response in enumerate(it.responses)
    }
    assert len(written["answers"]) == 5 * 4
    assert "<svg" in (tmp_path / "scores.svg").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"needles.jsonl", "scores.json", "scores.svg"}


def test_stdout_is_pure_json_with_format_json(run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    result = evaluate(run_folder, "--data", data, "--format", "json", "--seed", 3)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["checkpoint"], document["data"], document["seed"]) == (
        str(step_folder(run_folder, 1)),
        str(data),
        3,
    )
    assert document["questions"] == 5
    assert set(document["scores"]["document"]) >= {"exact", "f1", "rouge_l", "relative_f1", "relative_rouge_l"}


def test_a_terminal_shows_tables_and_progress(run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    result = evaluate(run_folder, "--data", data)
    assert result.exit_code == 0
    assert "────" in result.stdout
    assert all(label in result.stdout for label in LABELS.values())
    assert "3/3" in result.stderr
    assert "────" not in result.stderr


def test_any_documents_with_questions_can_be_evaluated(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "squad.jsonl"
    write_records(
        path,
        [
            Record("Ada Lovelace wrote notes in 1843.", ("Who wrote notes?", "When?"), ("Ada Lovelace", "1843"), ""),
            Record("The Nile flows north.", ("Where does the Nile flow?",), ("It flows north.",), ""),
        ],
    )
    result = evaluate(run_folder, "--data", path)
    assert (result.exit_code, result.stderr) == (0, f"{LOADING}\ncheckpoint {step_folder(run_folder, 1)}\n")
    assert result.stdout.startswith("2 documents, 3 questions")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "taken.json"], "taken.json exists and is never written over"),
        (["--plot", "taken.png"], "taken.png exists and is never written over"),
        (["-o", "absent/a.json"], "the folder absent does not exist"),
        (["--plot", "a.pdf"], "expected a name that ends in .png or .svg, found .pdf"),
        (["-o", "a.svg", "--plot", "a.svg"], "both name a.svg"),
        (["--format", "yaml"], "'text', 'json'"),
    ],
)
def test_paths_that_cannot_be_written_are_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken.json", "taken.png"):
        Path(name).write_text("mine")
    result = evaluate("no checkpoint", "--data", "no data", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"taken.json": "mine", "taken.png": "mine"}


def test_one_document_alone_is_refused(run_folder: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    write_records(one, needle_records(1, 2, 2, 0, seed=1))
    result = evaluate(run_folder, "--data", one)
    assert result.exit_code == 2
    assert "at least two different documents" in result.stderr
