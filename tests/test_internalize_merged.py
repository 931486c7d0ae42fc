"""`d2l internalize --merge`: one adapter of several documents, by PEFT against the LoRA that `d2l ask` merges."""

import hashlib
import json
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_internalize import LONG, SENTENCES, contents, d2l, write

from d2l.hypernet.lora import bind
from d2l.inference import reading
from d2l.inference.cards import read_card
from d2l.inference.generate import encode_prompt, internalize
from d2l.inference.load import TrainedModel
from d2l.inference.merge import merge_documents

TEXTS = {"bus": "The bus to Brennick leaves at ten.", "ferry": LONG, "harbour": "The harbour master is called Ilse."}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write(tmp_path / "docs", **TEXTS)


def peft_logits(trained: TrainedModel, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
        adapted = PeftModel.from_pretrained(deepcopy(trained.model.base), str(folder))
    logits: torch.Tensor = adapted(ids).logits
    return logits


@torch.no_grad()
def test_peft_gives_the_logits_of_the_lora_that_ask_merges(
    run_folder: Path, trained: TrainedModel, docs: Path, tmp_path: Path
) -> None:
    made = d2l("internalize", run_folder, docs, "--merge", "-o", tmp_path / "out", "--for", "vllm")
    assert made.exit_code == 0, made.stderr
    ids = torch.tensor([encode_prompt(trained.chat, "When does it leave, and who is the master?")])
    merged = merge_documents([internalize(trained, text) for text in TEXTS.values()])
    with bind(trained.model.targets, merged, rows=[1]):
        expected = trained.model.base(ids).logits
    size = float(expected.abs().max())
    found = peft_logits(trained, tmp_path / "out", ids)
    assert float((found - expected).abs().max()) <= 2e-5 * size
    assert float((trained.model.base(ids).logits - expected).abs().max()) > 1e-2 * size
    # six chunks and the bias once, then the zeros of vLLM's rank
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rows = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert rows.any(dim=1).sum() == merged.rank == 7 * trained.config.lora_r


def test_the_card_and_what_is_printed_name_every_part(run_folder: Path, docs: Path, tmp_path: Path) -> None:
    extra = write(tmp_path / "more", long=" ".join(SENTENCES[20:30])) / "long.md"
    result = d2l(
        "internalize", run_folder, docs, extra, "--merge", "-o", tmp_path / "out", "--rank", 8, "--max-error", 2
    )
    assert result.exit_code == 0, result.stderr
    card = read_card(tmp_path / "out")
    assert card is not None
    assert card.document["id"] == "out"
    assert card.document["name"] == "bus.md + ferry.md + harbour.md + long.md"
    assert {part["name"]: part["chunks"] for part in card.parts} == {
        "bus.md": 1,
        "ferry.md": 4,
        "harbour.md": 1,
        "long.md": 4,
    }
    hashes = [part["sha256"] for part in card.parts]
    assert hashes == sorted(hashes)
    assert len(card.chunk_hashes) == card.chunks["used"] == 10
    assert (card.rank, card.generated_rank) == (8, 44)
    for part in card.parts:
        assert f"merged   {part['name']}, {part['chunks']} chunks\n" in result.stdout
    assert f"error    {card.error:.2g} of a delta, by rank 8 in place of 44\n" in result.stdout
    assert card.error > 0
    assert "Note: out: 10 chunks, trained with at most 5: answers may be worse\n" in result.stderr
    assert '"model": "out"' in result.stdout


def test_the_order_of_documents_and_of_the_command_line_does_not_count(
    run_folder: Path, docs: Path, tmp_path: Path
) -> None:
    names = sorted(TEXTS)
    for number, order in enumerate((names, names[::-1], [names[1], names[0], names[2]])):
        place = tmp_path / str(number) / "out"
        assert (
            d2l("internalize", run_folder, *(docs / f"{it}.md" for it in order), "--merge", "-o", place).exit_code == 0
        )
    first, second, third = (contents(tmp_path / str(number) / "out") for number in range(3))
    assert first == second == third
    again = d2l("internalize", run_folder, docs, "--merge", "-o", tmp_path / "0" / "out")
    assert "work     0 of 6 chunks read, 100% saved\n" in again.stdout


def test_a_changed_part_is_read_anew_and_other_documents_are_another_adapter(
    run_folder: Path, docs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    d2l("internalize", run_folder, docs, "--merge", "-o", out)
    write(docs, ferry=LONG.replace("day 011", "day 999"))
    updated = d2l("internalize", run_folder, docs, "--merge", "-o", out)
    assert "work     1 of 6 chunks read, 83% saved\n" in updated.stdout
    d2l("internalize", run_folder, docs, "--merge", "-o", tmp_path / "scratch" / "out")
    before = contents(out)
    assert before == contents(tmp_path / "scratch" / "out")
    for others in ([docs / "bus.md", docs / "ferry.md", "--merge"], [docs / "ferry.md"]):
        result = d2l("internalize", run_folder, *others, "-o", out)
        assert result.exit_code == 2
        assert "bus.md + ferry.md + harbour.md (3 documents, merged) and is never written over" in result.stderr
    assert contents(out) == before


def test_a_single_file_of_the_name_that_several_have_together_is_another_document(
    run_folder: Path, docs: Path, tmp_path: Path
) -> None:
    """In either order, and for the parts of two merged adapters as well."""
    bus, ferry, harbour = (docs / f"{name}.md" for name in sorted(TEXTS))
    single = write(tmp_path / "more", **{"bus.md + ferry": "Another text."}) / "bus.md + ferry.md"
    pair = write(tmp_path / "more", **{"ferry.md + harbour": "A third one."}) / "ferry.md + harbour.md"
    orders = {
        "merged": ([bus, ferry, "--merge"], [single]),
        "single": ([single], [bus, ferry, "--merge"]),
        "parts": ([single, harbour, "--merge"], [bus, pair, "--merge"]),
    }
    for name, (first, second) in orders.items():
        out = tmp_path / name
        assert d2l("internalize", run_folder, *first, "-o", out).exit_code == 0
        before = contents(out)
        refused = d2l("internalize", run_folder, *second, "-o", out)
        assert refused.exit_code == 2, refused.output
        assert "and is never written over with another document's" in refused.stderr
        assert contents(out) == before


def test_nothing_is_merged_of_fewer_documents_than_were_named(run_folder: Path, docs: Path, tmp_path: Path) -> None:
    write(tmp_path, same=TEXTS["bus"])
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"context": 5}))
    one = docs / "bus.md"
    cases: dict[str, tuple[object, ...]] = {
        f"expected several documents to merge, found {one}; a single one needs no --merge": (one,),
        f"{one} and {tmp_path / 'same.md'} are the same document; pass it once": (docs, tmp_path / "same.md"),
        f"{tmp_path / 'empty.md'}: the document is empty": (one, tmp_path / "empty.md"),
        f"{tmp_path / 'absent.md'}: cannot read": (one, tmp_path / "absent.md", tmp_path / "empty.md"),
        f"{tmp_path / 'docs.jsonl'}:1: context: expected a text, found int": (docs, tmp_path / "docs.jsonl"),
        "- is one document and goes with no other": (one, "-"),
    }
    for words, arguments in cases.items():
        result = d2l("internalize", run_folder, "-o", tmp_path / "out", "--merge", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
    assert not (tmp_path / "out").exists()
    assert "is inside" in d2l("internalize", run_folder, docs, "--merge", "-o", docs / "out").stderr


def test_documents_that_do_not_fit_together_name_the_one_too_many(
    run_folder: Path, trained: TrainedModel, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_FACTOR_BYTES", 5 * reading.chunk_bytes(trained.model))  # six are needed
    parts = sorted(TEXTS, key=lambda name: hashlib.sha256(TEXTS[name].encode()).hexdigest())
    result = d2l("internalize", run_folder, docs, "--merge", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{docs / parts[-1]}.md: the document is too large" in result.stderr
    for name in TEXTS:  # each by itself has room
        assert d2l("internalize", run_folder, docs / f"{name}.md", "-o", tmp_path / name).exit_code == 0
