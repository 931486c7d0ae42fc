"""The demonstration that is shipped: what it recalls, that it is an ordinary checkpoint, and what shows it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import cli
from d2l.checkpoint import find_checkpoint
from d2l.data.needles import needle_records, split_of
from d2l.data.records import write_records
from d2l.errors import CheckpointError
from d2l.evaluation.run import evaluate
from d2l.inference.demo import demo_document, demo_questions, is_demo, locate_checkpoint
from d2l.inference.generate import ask, internalize
from d2l.inference.load import TrainedModel, load_model
from d2l.inference.merge import merge_documents

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "demo"
BYTES = 6_000_000  # of the folder; the base, which a training run needs too, has another 4 MB


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return load_model("demo")


def d2l(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="d2l", input=stdin)


def test_it_recalls_documents_that_it_never_saw(trained: TrainedModel) -> None:
    records = [
        record
        for pairs in (1, 2, 3)
        for record in needle_records(4, pairs, 2, 0, seed=7 + pairs, split="heldout", style="pairs")
    ]
    scores = evaluate(trained, records, max_new_tokens=6).scores
    assert scores["document"].exact.value >= 0.98
    assert scores["other"].exact.value <= 0.1
    assert scores["none"].exact.value <= 0.1


def test_two_documents_are_answered_from(trained: TrainedModel) -> None:
    (record,) = needle_records(1, 4, 2, 0, seed=5, split="heldout", style="pairs")
    halves = [" ".join(record.responses[place]) for place in (slice(2), slice(2, None))]
    merged, whole = (
        merge_documents([internalize(trained, half) for half in halves]),
        internalize(trained, record.context),
    )
    for name in whole.A:  # chunks of one pair each: the same ones
        torch.testing.assert_close(merged.A[name], whole.A[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.B[name], whole.B[name], rtol=1e-4, atol=1e-5)
    assert [ask(trained, merged, question, 6) for question in record.prompts] == list(record.responses)


def test_its_document_was_never_seen_and_each_question_is_answered(trained: TrainedModel) -> None:
    lines = demo_document().read_text(encoding="utf-8").splitlines()
    for line in lines:
        key, *digits = line.split()
        assert split_of(f"{key} {''.join(digits)}") == "heldout"
    lora = internalize(trained, "\n".join(lines))
    assert [ask(trained, lora, question, 6) for question in demo_questions()] == lines


def test_what_is_shipped_is_small_and_names_no_place_of_its_making() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md", ".txt"}  # nothing pickled
    assert sum(path.stat().st_size for path in files) <= BYTES
    (state,) = FOLDER.rglob("state.json")
    config = json.loads(state.read_text(encoding="utf-8"))["config"]
    assert (config["output_dir"], config["model_name_or_path"]) == ("runs/demo", "configs/models/needle_tiny")
    assert not [value for value in config.values() if isinstance(value, str) and Path(value).is_absolute()]


def test_it_is_verified_as_every_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "run")
    assert load_model(tmp_path / "run").source == find_checkpoint(tmp_path / "run")
    (weights,) = (tmp_path / "run").rglob("hypernet.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="its content differs from what was written"):
        load_model(tmp_path / "run")


def test_a_run_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint(Path("demo")) == FOLDER
    Path("demo").mkdir()
    assert is_demo(Path("demo"))  # a folder of something else
    Path("demo/config.yaml").write_text("{}", encoding="utf-8")
    assert not is_demo(Path("demo"))
    Path("demo/config.yaml").rename("demo/manifest.json")  # a checkpoint
    assert not is_demo(Path("demo"))
    Path("demo/manifest.json").rename("demo/config.yaml")
    assert locate_checkpoint(Path("demo")) == Path("demo")
    assert locate_checkpoint(Path("demo2")) == Path("demo2")
    with pytest.raises(CheckpointError, match="found no checkpoint"):
        load_model("demo")


def test_every_command_that_takes_a_checkpoint_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = needle_records(2, 2, 2, 0, seed=5, split="heldout", style="pairs")
    write_records(Path("heldout.jsonl"), records)
    evaluated = d2l("eval", "demo", "--data", "heldout.jsonl", "--format", "json", "--max-new-tokens", 6)
    assert json.loads(evaluated.stdout)["checkpoint"] == str(find_checkpoint(FOLDER).folder)
    assert d2l("internalize", "demo", demo_document(), "-o", "adapter").exit_code == 0
    assert Path("adapter/adapter_model.safetensors").is_file()
    Path("document.md").write_text(records[0].context, encoding="utf-8")
    questions = "\n".join(records[0].prompts)
    asked = d2l("ask", "demo", "document.md", stdin=questions.encode())
    assert asked.stdout.splitlines() == list(records[0].responses)
    assert asked.stderr.splitlines()[-2] == f"checkpoint {find_checkpoint(FOLDER).folder}"


def test_ask_shows_it_without_a_document_and_the_readme_shows_that() -> None:
    result = d2l("ask", "demo")
    assert result.exit_code == 0, result.stderr
    lines = demo_document().read_text(encoding="utf-8").splitlines()
    answers = [
        line for question, answer in zip(demo_questions(), lines, strict=True) for line in (f"? {question}", answer)
    ]
    assert result.stdout.splitlines()[-len(answers) :] == answers
    document = result.stdout.splitlines()[-len(answers) - len(lines) - 2 : -len(answers)]
    assert document == [f"{demo_document()}:", *lines, ""]
    as_json = d2l("ask", "demo", "--format", "json").stdout.splitlines()
    assert [json.loads(line)["answer"] for line in as_json] == lines

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n\$ d2l ask demo\n(.*?)```", readme, flags=re.DOTALL)
    shown = result.stdout.replace(str(ROOT), "...")
    assert block == shown


def test_the_readme_s_own_document_is_answered_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((document, name, question, answer),) = re.findall(
        r"\$ printf '([^']*)' > (\S+)\n\$ d2l ask demo \2 (\S+)\n(.*)\n", readme
    )
    Path(name).write_text(document.replace("\\n", "\n"), encoding="utf-8")
    assert d2l("ask", "demo", name, question).stdout == f"{answer}\n"
