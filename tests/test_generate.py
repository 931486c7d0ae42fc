"""Inference: documents into LoRAs, prompts, stop tokens and answers; the reference's numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden
from support.golden import assert_close, load_case
from test_end_to_end import build
from torch import Tensor

from d2l.checkpoint import load_checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.data.chat.format import chat_format
from d2l.data.chunks import chunk_document
from d2l.data.document import decode_document
from d2l.data.limits import Limits
from d2l.data.packing import collate
from d2l.data.tokenize import Row
from d2l.errors import CheckpointError, DataError, ModelError
from d2l.hypernet.lora import Lora, bind
from d2l.inference.generate import (
    ask,
    decode_answer,
    encode_prompt,
    find_stop_ids,
    generate,
    internalize,
    tokenize_document,
)
from d2l.inference.load import TrainedModel, load_model
from d2l.io.run_folder import step_folder

SHORT = "The ferry to Brennick leaves at nine."
LONG = " ".join(f"On day {day} the ferry leaves at {day % 12}." for day in range(12))

TURN = "<|start|>assistant<|channel|>final<|message|>"


def supervised(trained: TrainedModel, supervision: Any) -> TrainedModel:
    return replace(trained, chat=chat_format(trained.chat.tokenizer, supervision=supervision))


# Loading


def test_a_document_is_cut_as_in_training(trained: TrainedModel) -> None:
    """By another rule the chunks, and with them the LoRA, are others."""
    found = []
    for chunking in ("equal", "sentences"):
        changes = {"chunking": chunking, "max_ctx_chunk_len": 200, "max_packed_ctx_len": -1}
        own = replace(trained, config=trained.config.model_copy(update=changes))
        expected = chunk_document(LONG, own.chat, Limits.of(own.config, own.model.base.config))
        found.append(tokenize_document(own, LONG))
        assert found[-1] == expected
    assert found[0] != found[1]


def test_the_newest_checkpoint_of_a_run_is_loaded_with_its_config(run_folder: Path, trained: TrainedModel) -> None:
    saved = load_checkpoint(step_folder(run_folder, 1))
    own = trained.model.hypernet.state_dict()
    assert all(torch.equal(own[name], value) for name, value in saved.hypernet.items())
    assert trained.config == RunConfig(**saved.state["config"])
    assert not any(parameter.requires_grad for parameter in trained.model.base.parameters())
    assert not any(module.training for module in trained.model.modules())
    first = load_model(step_folder(run_folder, 0)).model.hypernet.state_dict()
    assert not any(first[f"scaler_B.{name}"].any() for name in trained.config.target_modules)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"hidden_size": 2880}, "hidden_size: expected 2880, found 64"),
        ({"vocab_size": 201088, "num_hidden_layers": 24}, "num_hidden_layers: expected 24, found 4"),
        ({"model_type": "llama"}, "model_type: expected 'llama', found 'gpt_oss'"),
    ],
)
def test_another_base_is_refused_before_it_is_loaded(
    tmp_path: Path, run_folder: Path, facts: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_checkpoint(step_folder(run_folder, 1))
    state = {**saved.state, "base": {**saved.state["base"], **facts}}
    save_checkpoint(tmp_path / "step-000001", replace(saved, state=state))
    monkeypatch.setattr("d2l.build.build_base", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(CheckpointError, match=expected):
        load_model(tmp_path / "step-000001")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, run_folder: Path) -> None:
    saved = load_checkpoint(step_folder(run_folder, 1))
    config = {**saved.state["config"], "lora_rank": 4, "lora_r": "eight"}
    save_checkpoint(tmp_path / "other", replace(saved, state={"config": config}))
    with pytest.raises(CheckpointError, match=r"another version:\n(.*\n)?  lora_r: .*integer"):
        load_model(tmp_path / "other")
    save_checkpoint(tmp_path / "rank", replace(saved, state={"config": {**saved.state["config"], "lora_r": 2}}))
    with pytest.raises(CheckpointError, match=r"of another model: .* expected .* found"):
        load_model(tmp_path / "rank")
    with pytest.raises(CheckpointError, match="expected a run's folder or a step-NNNNNN folder"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="no/such/model"):
        load_model(run_folder, "no/such/model")


def test_a_base_that_has_moved(run_folder: Path, trained: TrainedModel, tmp_path: Path) -> None:
    from d2l.io.resources import resource

    tiny = resource("configs/models/tiny_gpt_oss")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors"):
        load_model(run_folder, str(tmp_path))  # a folder without weights is not taken for the random base
    moved = load_model(run_folder, str(tiny))
    assert moved.config.model_name_or_path == str(tiny)
    assert torch.equal(internalize(moved, SHORT).A["v_proj"], internalize(trained, SHORT).A["v_proj"])


# Documents


def test_internalize_gives_the_lora_of_training(trained: TrainedModel) -> None:
    for text, chunks in ((SHORT, 1), (LONG, 4)):
        pieces = chunk_document(text, trained.chat, Limits.of(trained.config))
        assert len(pieces) == chunks
        lora = internalize(trained, text)
        assert (lora.n_contexts, lora.rank) == (1, trained.config.lora_r * (chunks + 1))
        packed = collate([Row(0, chunk_document("Another document.", trained.chat, Limits()), ()), Row(1, pieces, ())])
        with torch.no_grad():
            beside = trained.model.lora(packed)[1]
        for name in lora.A:
            torch.testing.assert_close(lora.A[name], beside.A[name][:, :, : lora.rank], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lora.B[name], beside.B[name][:, :, : lora.rank], rtol=1e-4, atol=1e-5)
            assert not lora.A[name].requires_grad


def test_a_document_over_the_limits_is_refused(trained: TrainedModel) -> None:
    few = replace(trained, config=trained.config.model_copy(update={"max_ctx_chunk_num": 2}))
    with pytest.raises(DataError, match="max_ctx_chunk_num 2"):
        internalize(few, LONG)
    with pytest.raises(DataError, match=r"max_packed_ctx_len 600.*\n.*pass a shorter document"):
        internalize(trained, LONG * 4)
    with pytest.raises(DataError, match="no token"):
        internalize(trained, "")


def test_a_document_beyond_the_positions_of_the_base_is_refused(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(trained, config=trained.config.model_copy(update={"max_ctx_chunk_len": -1}))
    internalize(whole, LONG)
    monkeypatch.setattr(trained.model.base.config, "max_position_embeddings", 200)
    internalize(trained, LONG)  # in chunks
    with pytest.raises(DataError, match=r"tokens of document in one chunk > 200, .*max_ctx_chunk_len to at most 200\n"):
        internalize(whole, LONG)


def test_documents_are_utf8_text() -> None:
    assert decode_document("\ufeffDas Fährschiff.\n".encode(), "it.txt") == "Das Fährschiff.\n"
    for data, expected in (
        (b"\x89PNG\r\n", "byte 0x89 at 0"),
        ("Fähre".encode("latin-1"), "byte 0xe4 at 1"),
        (b"a \xe4t \xff", "byte 0xe4 at 2;"),  # the first of several
        (b"\xef\xbb\xbfF\xe4hre", "byte 0xe4 at 4;"),  # behind a byte order mark, which the codec does not count
        (b"PK\x03\x04\0\0", "zero byte at 4"),
        (b"", "empty"),
        (b" \n\t", "empty"),
    ):
        with pytest.raises(DataError, match=f"it.txt: .*{expected}"):
            decode_document(data, "it.txt")


# Prompts and answers


@pytest.mark.parametrize("supervision", ["content", "sampled"])
def test_a_prompt_ends_where_supervision_begins(trained: TrainedModel, supervision: str) -> None:
    chat = supervised(trained, supervision).chat
    encoded = chat.encode([{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine."}])
    begin = encoded.supervised.index(True)
    assert encode_prompt(chat, "When?") == encoded.input_ids[:begin]
    assert decode_answer(chat, encoded.input_ids[begin:-1]) == "At nine."
    assert encoded.input_ids[-1] in find_stop_ids(chat, None)


@pytest.mark.parametrize(("supervision", "also"), [("content", ["<|end|>"]), ("sampled", [])])
def test_an_answer_of_harmony_ends_at_its_stop_tokens(trained: TrainedModel, supervision: str, also: list[str]) -> None:
    """From the format's own description: `<|return|>`, `<|call|>` of a tool, and what ends a text."""
    chat = supervised(trained, supervision).chat
    found = chat.tokenizer.convert_ids_to_tokens(find_stop_ids(chat, None))
    assert sorted(found) == sorted(["<|return|>", "<|call|>", "<|endoftext|>", *also])


@pytest.mark.parametrize(
    ("supervision", "output", "expected"),
    [
        ("content", "At nine.", "At nine."),
        ("content", " At nine. \n", "At nine."),
        ("content", "At<|channel|>final<|message|>nine.", "nine."),
        ("content", "At nine.<|channel|>final", "At nine."),
        ("content", "<|startoftext|>At <|reserved_1014|>nine.", "At nine."),
        ("sampled", "<|channel|>final<|message|>At nine.", "At nine."),
        ("sampled", "<|channel|>analysis<|message|>Nine?<|end|>" + TURN + "Nine.", "Nine."),
        ("sampled", "<|channel|>analysis<|message|>Is it final?", ""),
        ("sampled", "<|channel|>final", ""),
        ("sampled", "final At nine.", ""),
    ],
)
def test_no_channel_leaks_into_an_answer(trained: TrainedModel, supervision: str, output: str, expected: str) -> None:
    chat = supervised(trained, supervision).chat
    assert decode_answer(chat, chat.encode_text(output)) == expected


@pytest.fixture
def scripted(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the base generate a given text, and record its prompts and generation configs."""
    calls: list[tuple[list[int], Any]] = []

    def script(text: str) -> list[tuple[list[int], Any]]:
        def generated(prompts: Tensor, *, generation_config: Any, **_: Any) -> Tensor:
            calls.append((prompts[0].tolist(), generation_config))
            return torch.cat([prompts, torch.tensor([trained.chat.encode_text(text)])], dim=1)

        monkeypatch.setattr(trained.model.base, "generate", generated)
        return calls

    return script


@pytest.mark.parametrize(
    ("supervision", "output", "expected"),
    [
        ("content", "At nine.<|end|>" + TURN + "Or ten.<|return|>", "At nine."),
        ("content", "At nine.<|return|><|return|>", "At nine."),
        ("sampled", "<|channel|>analysis<|message|>Hm.<|end|>" + TURN + "At nine.<|return|>x", "At nine."),
    ],
)
def test_an_answer_ends_at_its_stop_token(
    trained: TrainedModel, scripted: Any, supervision: str, output: str, expected: str
) -> None:
    calls = scripted(output)
    model = supervised(trained, supervision)
    assert ask(model, None, "When does it leave?", 8) == expected
    ((prompt, config),) = calls
    header = "<|channel|>final<|message|>" if supervision == "content" else ""
    assert trained.chat.decode(prompt).endswith(f"When does it leave?<|end|><|start|>assistant{header}")
    assert config.max_new_tokens == 8
    assert not config.do_sample


def test_a_random_model_answers_deterministically_and_without_control_tokens(trained: TrainedModel) -> None:
    lora = internalize(trained, LONG)
    answers = {ask(trained, lora, "When does the ferry leave?", 12) for _ in range(2)}
    assert len(answers) == 1
    assert "<|" not in answers.pop()


def test_generation_is_greedy_whatever_the_generation_config(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.tensor([encode_prompt(trained.chat, "When?")])
    lora = internalize(trained, SHORT)
    expected = generate(trained.model, lora, prompt, stop=[], max_new_tokens=6)
    defaults = trained.model.base.generation_config
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 1e-3, "num_beams": 3}.items():
        monkeypatch.setattr(defaults, name, value)
    assert generate(trained.model, lora, prompt, stop=[int(expected[0, 1])], max_new_tokens=6).shape == (1, 2)
    assert torch.equal(generate(trained.model, lora, prompt, stop=[], max_new_tokens=6), expected)


def strong(lora: Lora) -> Lora:
    """Scale a LoRA so that it changes the answers of a random base after one training step."""
    return replace(lora, scale=100 * lora.scale)


@torch.no_grad()
def test_cached_generation_is_the_argmax_of_whole_forwards(trained: TrainedModel) -> None:
    """Two contexts in one batch, longer than the sliding window, against a loop without a cache."""
    model = trained.model
    texts = (LONG, "Snow fell on the pass, and nobody came.")
    loras = [strong(internalize(trained, text)) for text in texts]
    batch = collate(
        [Row(i, chunk_document(text, trained.chat, Limits.of(trained.config)), ()) for i, text in enumerate(texts)]
    )
    both = strong(model.lora(batch))
    prompt = torch.tensor([encode_prompt(trained.chat, "When does the ferry leave?")] * 2)
    found = generate(model, both, prompt, stop=[], max_new_tokens=5)
    for row, lora in enumerate(loras):
        ids = prompt[row : row + 1]
        for _ in range(5):
            with bind(model.targets, lora, rows=[1]):
                logits = model.base(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert found[row].tolist() == ids[0, prompt.shape[1] :].tolist()
    assert found[0].tolist() != found[1].tolist()


@pytest.mark.golden
@torch.no_grad()
def test_generation_of_the_reference(shared: Path) -> None:
    """Padded contexts there, packed ones here; the same LoRAs, prefill logits and greedy tokens."""
    case = load_case(shared, "generate_01_llama")
    model = build(case)
    lengths = case["in.ctx_attn_mask"].sum(1).tolist()
    chunks = [tuple(ids[:length].tolist()) for ids, length in zip(case["in.ctx_ids"], lengths, strict=True)]
    first, second = case["in.n_ctx_chunks"].tolist()
    assert first + second == len(chunks)
    lora = model.lora(collate([Row(0, tuple(chunks[:first]), ()), Row(1, tuple(chunks[first:]), ())]))
    assert_close(lora.A["q_proj"], case["out.combined.q_proj.A"], golden.OUTPUTS, "A")
    assert_close(lora.B["q_proj"], case["out.combined.q_proj.B"], golden.OUTPUTS, "B")
    prompts = case["in.input_ids"]
    with bind(model.targets, lora, rows=[1, 1]):
        assert_close(model.base(input_ids=prompts).logits, case["out.logits"], golden.OUTPUTS, "logits")
    found = generate(model, lora, prompts, stop=[], max_new_tokens=8)
    assert torch.cat([prompts, found], dim=1).tolist() == case["out.sequences"].tolist()
