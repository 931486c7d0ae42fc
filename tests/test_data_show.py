"""`d2l data show`: packed rows as the run would see them, in words, in colour and as a page."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.html_page import Page
from support.tiny_run import tiny_config
from typer.testing import CliRunner, Result

import cli
from checks.printable import printable
from commands.packed_rows import SUPERVISED, coloured, describe_row, plain
from d2l.build import Components
from d2l.config.load import load_config
from d2l.data.epochs import epoch_batches
from d2l.data.packing import PackedBatch
from d2l.evaluation.sample import read_batch

CONFIG = "configs/tiny_gpt_oss.yaml"


def show(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["data", "show", *map(str, arguments)], prog_name="d2l")


def first_batch() -> tuple[Components, PackedBatch]:
    components = Components(load_config(CONFIG))
    return components, epoch_batches(components.config, components.rows, epoch=0)[0]


def test_joined_texts_are_the_row_and_the_marked_tokens_those_with_a_label() -> None:
    result = show(CONFIG)
    assert result.exit_code == 0, result.stderr
    components, batch = first_batch()
    decode = components.tokenizer.decode
    parts = re.split(r"\n\n--- .*\n", result.stdout.rstrip("\n"))[1:]
    assert len(parts) == sum(batch.n_ctx_chunks) + sum(batch.n_queries)
    chunks, questions = parts[: sum(batch.n_ctx_chunks)], parts[sum(batch.n_ctx_chunks) :]
    assert "".join(chunks) == decode(batch.ctx_ids[0])
    assert re.sub(r"\[\[|\]\]", "", "".join(questions)) == decode(batch.input_ids[0])
    labelled = batch.labels[0][batch.labels[0] != -100]
    assert "".join(re.findall(r"\[\[(.*?)\]\]", "".join(questions), re.DOTALL)) == decode(labelled)
    assert len(re.findall(r"\[\[", "".join(questions))) == sum(batch.n_queries)
    starts = [int(text) for text in re.findall(r"^--- question.* tokens (\d+) to", result.stdout, re.MULTILINE)]
    assert starts == (batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
    ends = [int(text) for text in re.findall(r"^--- question.* tokens \d+ to (\d+) of", result.stdout, re.MULTILINE)]
    assert ends == [*(start - 1 for start in starts[1:]), batch.n_tokens - 1]


def test_a_terminal_shows_the_same_tokens_in_colour() -> None:
    components, batch = first_batch()
    sources = [components.records[record].source for record in batch.record_ids]
    row = read_batch(components.chat, batch, whole=True)
    shown = describe_row(0, 1, row, sources, documents=False, questions=True)
    screen = Console(width=10_000, color_system="truecolor", force_terminal=True, legacy_windows=False)
    marked = "".join(
        segment.text for segment in screen.render(coloured([shown])) if str(segment.style).startswith(SUPERVISED)
    )
    labelled = components.tokenizer.decode(batch.labels[0][batch.labels[0] != -100])
    assert marked == "supervised tokens" + labelled


def test_the_page_holds_every_token_with_its_id_and_position(tmp_path: Path) -> None:
    path = tmp_path / "row.html"
    result = show(CONFIG, "--input", "--html", path)
    assert result.exit_code == 0, result.stderr
    components, batch = first_batch()
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "://" not in text
    tokens = [attributes["title"] for tag, attributes in page.seen if tag in ("span", "mark") and "title" in attributes]
    pairs = zip(batch.position_ids[0].tolist(), batch.input_ids[0].tolist(), strict=True)
    assert tokens == [f"position {position}, id {token}" for position, token in pairs]
    labelled = batch.labels[0][batch.labels[0] != -100].tolist()
    assert page.text["mark"][1:] == [components.tokenizer.decode([token]) for token in labelled]
    again = show(CONFIG, "--html", path)
    assert (again.exit_code, path.read_text(encoding="utf-8")) == (2, text)
    assert "never written over" in again.stderr


def test_rows_epochs_and_sides_are_chosen() -> None:
    both = show(CONFIG, "--row", 2, "--row", 1, "--context").stdout
    assert re.findall(r"=== row (\d+) of", both) == ["2", "1"]
    assert "--- chunk" in both
    assert "--- question" not in both
    assert both != show(CONFIG, "--row", 2, "--row", 1, "--context", "--epoch", 1).stdout
    beyond = show(CONFIG, "--row", 9999)
    assert (beyond.exit_code, "has the packed rows 0 to" in beyond.stderr) == (2, True)


def test_what_comes_from_data_cannot_act(tmp_path: Path) -> None:
    text = "\x1b[2J<script>alert(1)</script> The bridge is red."
    record = {"context": text, "prompts": ["Which colour?"], "responses": ["Red\x1b."]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    options = ("--data", tmp_path / "a.jsonl")
    shown = show(CONFIG, *options)
    assert "\x1b" not in shown.stdout
    assert printable("\x1b[2J<script>") in shown.stdout
    assert show(CONFIG, *options, "--html", tmp_path / "a.html").exit_code == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "holds no records"),
        ("broken.jsonl", '{"context": "a", "prompts": ["b"], "responses": ["c"]}\n{"context\n', "line 2"),
        ("folder", None, "does not exist"),
    ],
)
def test_data_that_cannot_be_used_ends_in_a_message(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    result = show(CONFIG, "--data", tmp_path / name)
    assert (result.exit_code, message in result.stderr) == (2, True)
    assert "Traceback" not in result.stderr


def test_a_question_of_one_token_has_its_facts() -> None:
    components = Components(tiny_config())
    batch = epoch_batches(components.config, components.rows, epoch=0)[0]
    row = read_batch(components.chat, batch, whole=True)
    shown = describe_row(3, 7, row, ["here:1"] * len(row.records), documents=True, questions=True)
    assert "row 3 of 7" in plain([shown])
    assert f"{batch.n_labels} of them supervised" in shown.title
