"""`d2l internalize` of several documents: batches, what is kept, updates bit for bit, bad input, a bound on memory."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.live_bytes import LiveBytes
from support.tiny_run import make_run
from typer.testing import CliRunner, Result

import cli
from d2l.errors import CheckpointError
from d2l.inference.batch import Internalizer, Outcome
from d2l.inference.cards import Index, open_index, read_card
from d2l.inference.documents import Document
from d2l.inference.generate import internalize
from d2l.inference.load import TrainedModel
from d2l.inference.reading import trained_bounds
from d2l.inference.servers import AdapterForm
from d2l.io.run_folder import step_folder

WEIGHTS = "adapter_model.safetensors"
SENTENCES = [f"On day {day:03} the ferry leaves at {day % 8 + 1}." for day in range(40)]
LONG = " ".join(SENTENCES[:12])  # in 4 chunks


def d2l(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return folder


def read_index(folder: Path) -> dict[str, dict[str, object]]:
    return {entry["id"]: entry for entry in map(json.loads, (folder / "index.jsonl").read_text().splitlines())}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(
    trained: TrainedModel, folder: Path, *texts: str, form: AdapterForm | None = None, pack: int | None = None
) -> list[Outcome]:
    documents = (Document(f"d{number}", f"d{number}", "here", text) for number, text in enumerate(texts))
    return list(Internalizer(trained, form or AdapterForm(), lambda id_: folder / id_, pack).run(documents))


# One command


def test_a_folder_of_documents_becomes_a_folder_of_adapters(
    run_folder: Path, trained: TrainedModel, tmp_path: Path
) -> None:
    docs = write(tmp_path / "docs", ferry="The ferry leaves at nine.", same="The ferry leaves at nine.", long=LONG)
    (docs / "picture.png").write_bytes(b"\x89PNG")
    (docs / "empty.txt").touch()
    result = d2l("internalize", run_folder, docs, "-o", tmp_path / "out", "--for", "vllm")
    assert result.exit_code == 14
    assert "adapters 3 made, 0 kept, 2 failed\nwork     5 of 6 chunks read, 17% saved\n" in result.stdout
    assert "same as  same ferry\n" in result.stdout
    assert f"failed   {docs / 'empty.txt'}: the document is empty\n" in result.stdout
    assert "--max-lora-rank 32 --max-loras 3 --lora-target-modules qkv_proj v_proj\nask      curl " in result.stdout
    assert "document 5/5  " in result.stderr
    index = read_index(tmp_path / "out")
    statuses = {"ferry": "done", "same": "duplicate", "long": "done", "picture": "failed", "empty": "failed"}
    assert {id_: entry["status"] for id_, entry in index.items()} == statuses
    assert index["same"]["duplicate_of"] == "ferry"
    assert (index["long"]["chunks"], index["long"]["rank"]) == (4, 32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ferry", "same", "long", "index.jsonl"}
    for id_, text in (("ferry", "The ferry leaves at nine."), ("same", "The ferry leaves at nine."), ("long", LONG)):
        lora, tensors = internalize(trained, text), load_file(tmp_path / "out" / id_ / WEIGHTS)
        rows = tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].mT[: lora.rank]
        torch.testing.assert_close(rows, lora.B["v_proj"][0, 1] * lora.scale, rtol=1e-4, atol=1e-5)


def test_an_adapter_names_what_it_is_of(run_folder: Path, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", long=LONG, longer=" ".join(SENTENCES))
    result = d2l("internalize", run_folder, docs, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "Note: longer: 14 chunks, trained with at most 5: answers may be worse\n" in result.stderr
    card = read_card(tmp_path / "out" / "longer")
    assert card is not None
    assert card.base == "configs/models/tiny_gpt_oss"
    assert card.checkpoint["folder"] == str(step_folder(run_folder, 1))
    assert dict(card.chunks) == {"used": 14, "longest": card.chunks["longest"], "trained": 5, "trained_longest": 120}
    assert (card.rank, card.error, len(card.chunk_hashes)) == (60, 0.0, 14)


def test_jsonl_and_the_second_run_that_keeps_what_is_right(run_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "docs.jsonl", tmp_path / "out"
    lines = [{"id": "first", "context": "The ferry leaves at nine."}, {"context": LONG}]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert d2l("internalize", run_folder, data, "-o", out).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob(WEIGHTS)}
    assert {path.parent.name for path in before} == {"first", "docs-000002"}
    weights = out / "first" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # damaged: made again
    lines.append({"id": "third", "context": "The bus leaves at ten."})
    data.write_text("\n".join(map(json.dumps, lines)))
    again = d2l("internalize", run_folder, data, "-o", out)
    assert "adapters 2 made, 1 kept, 0 failed\n" in again.stdout
    assert weights.read_bytes()[-1:] != b"x"
    kept = out / "docs-000002" / WEIGHTS
    assert kept.stat().st_mtime_ns == before[kept]
    assert read_index(out).keys() == {"first", "docs-000002", "third"}
    shutil.rmtree(out / "third")
    data.write_text(json.dumps(lines[0]))
    fewer = d2l("internalize", run_folder, data, "-o", out)
    beside = "beside   adapters of documents that were not among these: docs-000002; remove what is not wanted\n"
    assert (beside in fewer.stdout, "beside" in again.stdout) == (True, False)
    assert read_index(out).keys() == {"first", "docs-000002"}


def test_one_document_is_updated_in_its_own_folder(run_folder: Path, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a=LONG, b="The bus leaves at ten.")
    d2l("internalize", run_folder, docs / "a.md", "-o", tmp_path / "adapter")
    kept = d2l("internalize", run_folder, docs / "a.md", "-o", tmp_path / "adapter")
    assert "work     0 of 4 chunks read, 100% saved" in kept.stdout
    write(docs, a=LONG.replace("day 011", "day 999"))
    updated = d2l("internalize", run_folder, docs / "a.md", "-o", tmp_path / "adapter")
    assert "work     1 of 4 chunks read, 75% saved" in updated.stdout
    scratch = tmp_path / "elsewhere" / "adapter"
    d2l("internalize", run_folder, docs / "a.md", "-o", scratch)
    assert contents(tmp_path / "adapter") == contents(scratch)
    other = d2l("internalize", run_folder, docs / "b.md", "-o", tmp_path / "adapter")
    assert other.exit_code == 2
    assert "holds the adapter of a.md and is never written over" in other.stderr


# Updates and batches, bit for bit


@pytest.mark.parametrize(
    ("form", "saved"),
    [
        (AdapterForm(), 3),
        (AdapterForm(dtype="bfloat16"), 3),
        (AdapterForm("sglang"), 3),
        (AdapterForm("peft", 16, "float32", 2.0), 0),  # refactored: its rows are no chunk's
    ],
)
def test_an_update_equals_the_same_from_scratch(
    trained: TrainedModel, tmp_path: Path, form: AdapterForm, saved: int
) -> None:
    (first,) = run(trained, tmp_path / "a", LONG, form=form)
    assert (first.read, first.reused) == (4, 0)
    changed = LONG.replace("day 004", "day 777")
    (updated,) = run(trained, tmp_path / "a", changed, form=form)
    assert (updated.read, updated.reused) == (4 - saved, saved)
    run(trained, tmp_path / "b", changed, form=form)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_dtype_is_made_of_float32_chunks_but_not_the_other_way(trained: TrainedModel, tmp_path: Path) -> None:
    half = AdapterForm(dtype="bfloat16")
    run(trained, tmp_path / "a", LONG)
    assert run(trained, tmp_path / "a", LONG, form=half)[0].reused == 4
    assert run(trained, tmp_path / "a", LONG)[0].reused == 0
    run(trained, tmp_path / "b", LONG)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rounded_chunks_make_no_adapter_of_a_smaller_rank(trained: TrainedModel, tmp_path: Path) -> None:
    half, smaller = AdapterForm(dtype="bfloat16"), AdapterForm("peft", 4, "bfloat16", 2.0)
    run(trained, tmp_path / "a", LONG, form=half)
    assert run(trained, tmp_path / "a", LONG, form=smaller)[0].reused == 0
    run(trained, tmp_path / "b", LONG, form=smaller)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_neighbours_and_an_interruption_leave_no_trace(trained: TrainedModel, tmp_path: Path) -> None:
    texts = ["The bus leaves at ten.", LONG, " ".join(SENTENCES[20:31])]
    run(trained, tmp_path / "all", *texts)
    documents = [Document(f"d{number}", f"d{number}", "here", text) for number, text in enumerate(texts)]
    stopped = Internalizer(trained, AdapterForm(), lambda id_: tmp_path / "stopped" / id_).run(documents)
    next(stopped)
    assert [outcome.status for outcome in run(trained, tmp_path / "stopped", *texts)] == ["kept", "made", "made"]
    assert contents(tmp_path / "all") == contents(tmp_path / "stopped")


def test_packed_chunks_are_the_same_up_to_rounding(trained: TrainedModel, tmp_path: Path) -> None:
    texts = ["The bus leaves at ten.", LONG, "The train leaves at one.", LONG]
    run(trained, tmp_path / "alone", *texts)
    passes: list[int] = []
    packed = Internalizer(trained, AdapterForm(), lambda id_: tmp_path / "packed" / id_, 400)
    model = trained.model
    whole, model.chunk_loras = model.chunk_loras, lambda batch: (passes.append(batch.ctx_ids.shape[1]), whole(batch))[1]  # type: ignore[method-assign]
    try:
        outcomes = list(packed.run(Document(f"d{i}", f"d{i}", "here", text) for i, text in enumerate(texts)))
    finally:
        del model.chunk_loras
    assert sum(outcome.read for outcome in outcomes) == 6
    assert outcomes[3].duplicate_of == "d1"
    assert len(passes) == 2
    assert max(passes) <= 400
    for number in range(len(texts)):
        alone, other = (load_file(tmp_path / name / f"d{number}" / WEIGHTS) for name in ("alone", "packed"))
        for name, value in alone.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


# What is refused


def test_an_adapter_of_a_checkpoint_trained_anew_or_of_another_base_is_not_kept(
    trained: TrainedModel, tmp_path: Path
) -> None:
    text = "The ferry leaves at nine."
    run(trained, tmp_path, text)
    elsewhere = replace(trained, config=trained.config.model_copy(update={"model_name_or_path": "another/base"}))
    anew, moved = (Internalizer(it, AdapterForm(), lambda id_: tmp_path / id_) for it in (trained, elsewhere))
    anew.checkpoint = {**anew.checkpoint, "sha256": "0" * 64}  # in the same folder
    for internalizer in (anew, moved):
        (outcome,) = internalizer.run([Document("d0", "d0", "here", text)])
        assert outcome.status == "failed"
        assert "another checkpoint or base" in outcome.reason


def test_folders_of_others_are_refused(run_folder: Path, trained: TrainedModel, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a="The ferry leaves at nine.", b="The bus leaves at ten.")
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("absent")
    never = "never written over"
    for place, words in (("mine", never), ("link", never), ("docs", never), ("docs/out", "is inside")):
        result = d2l("internalize", run_folder, docs, "-o", tmp_path / place)
        assert result.exit_code == 2
        assert words in result.stderr
    other = make_run(tmp_path / "other", seed=1)
    assert d2l("internalize", run_folder, docs, "-o", tmp_path / "out").exit_code == 0
    before = contents(tmp_path / "out")
    result = d2l("internalize", other, docs, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds adapters of another checkpoint: a is of " in result.stderr
    assert contents(tmp_path / "out") == before
    d2l("internalize", run_folder, docs / "a.md", "-o", tmp_path / "one")
    assert "another checkpoint or base" in d2l("internalize", other, docs / "a.md", "-o", tmp_path / "one").stderr
    (tmp_path / "out" / "b" / "d2l.json").unlink()  # somebody else's adapter now
    shutil.rmtree(tmp_path / "out" / "a")
    (tmp_path / "out" / "a").symlink_to("absent")
    again = d2l("internalize", run_folder, docs, "-o", tmp_path / "out").stdout
    for id_ in "ab":
        assert f"{tmp_path / 'out' / id_} exists, is no adapter with a card" in again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "vllm", "--rank", "24"], "--rank 24: vLLM has settings for the ranks 1, 8"),
        (["--rank", "0"], "--rank"),
        (["--for", "llama"], "--for"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_options_that_nothing_can_be_made_of(run_folder: Path, tmp_path: Path, options: list[str], words: str) -> None:
    docs = write(tmp_path / "docs", a="The ferry leaves at nine.")
    result = d2l("internalize", run_folder, docs, "-o", tmp_path / "out", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_an_adapter_that_changes_nothing_and_a_rank_that_costs_too_much(run_folder: Path, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a=LONG)
    zero = d2l("internalize", step_folder(run_folder, 0), docs / "a.md", "-o", tmp_path / "zero")
    assert zero.exit_code == 2
    assert "its B is zero" in zero.stderr
    costly = d2l("internalize", run_folder, docs, "-o", tmp_path / "out", "--rank", 2, "--max-error", 1e-6)
    assert costly.exit_code == 14
    assert "rank 20 as rank 2 moves a delta by" in costly.stdout
    assert not (tmp_path / "zero").exists()
    assert not (tmp_path / "out" / "a").exists()


def test_a_folder_has_one_writer_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    with open_index(tmp_path / "out") as index:
        index.add({"id": "a", "name": "a.md", "status": "failed", "checkpoint_sha256": "1"})
        with pytest.raises(CheckpointError, match="one writer at a time"), open_index(tmp_path / "out"):
            pass
    with (tmp_path / "out" / "index.jsonl").open("a") as file:
        file.write('{"id": "b", "na')
    assert Index(tmp_path / "out").known == {"a.md": "a"}


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        ({"max_ctx_chunk_len": -1}, (1, 600)),
        ({"max_ctx_chunk_len": -1, "max_ctx_len": 300}, (1, 300)),
        ({}, (5, 120)),
        ({"max_ctx_chunk_num": 2}, (2, 120)),
        ({"max_ctx_len": 300}, (3, 120)),
        ({"num_chunk_probs": {1: 0.5, 8: 0.5}}, (8, 120)),
    ],
)
def test_what_a_checkpoint_can_have_seen(
    trained: TrainedModel, fields: dict[str, object], bounds: tuple[int, int]
) -> None:
    assert trained_bounds(trained.config.model_copy(update=fields)) == bounds


# Memory


def peak(trained: TrainedModel, folder: Path, texts: Iterator[str]) -> int:
    documents = (Document(f"d{number}", f"d{number}", "here", text) for number, text in enumerate(texts))
    work = Internalizer(trained, AdapterForm(), lambda id_: folder / id_)
    with LiveBytes([*trained.model.parameters(), *trained.model.buffers()]) as bytes_:
        for outcome in work.run(documents):
            assert outcome.status == "made"
    return bytes_.peak


def test_more_documents_take_no_more_memory(trained: TrainedModel, tmp_path: Path) -> None:
    texts = [" ".join(f"{text} {number}" for text in SENTENCES[:3]) for number in range(100, 108)]
    few = peak(trained, tmp_path / "few", iter(texts[:3]))
    assert peak(trained, tmp_path / "many", iter(texts)) <= few * 1.01


@pytest.mark.slow
def test_a_megabyte_of_text_takes_no_more_memory(trained: TrainedModel, tmp_path: Path) -> None:
    """1,000 documents of 1 kB; and one of 100 kB needs its factors beside what one of 20 kB needs, whose chunks are full."""
    trained = replace(trained, config=trained.config.model_copy(update={"max_ctx_chunk_len": 600}))  # fewer passes
    texts = [f"{number} {' '.join(SENTENCES)}"[:1000] for number in range(1000, 2000)]
    few = peak(trained, tmp_path / "few", iter(texts[:3]))
    assert peak(trained, tmp_path / "many", iter(texts)) <= few * 1.01
    (outcome,) = run(trained, tmp_path / "long", " ".join(texts[:100]))
    assert outcome.card is not None
    factors = 4 * int(outcome.card.weights["bytes"])
    shorter = peak(trained, tmp_path / "shorter", iter([" ".join(texts[:20])]))
    assert peak(trained, tmp_path / "one", iter([" ".join(texts[:100])])) <= shorter + factors
