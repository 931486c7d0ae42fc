"""Every supported family: its shipped chat format, chunks of long documents under it, and a training step."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import ANSWERED, ATTENTION, CONVERSATION, DATE, FAMILIES, MLP, THOUGHTLESS, Family
from support.sizes import HYPERNETWORK, LAYERS

from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat, chat_format, default_template
from d2l.data.chat.supervision import supervised_texts, supervision_faults
from d2l.data.chat.templates import SHIPPED
from d2l.data.chunks import chunk_document
from d2l.data.limits import Limits
from d2l.data.records import Record
from d2l.data.tokenize import tokenize_records
from d2l.errors import DataError, ModelError
from d2l.hypernet.model import DocToLora
from d2l.inference.generate import decode_answer, encode_prompt, find_stop_ids
from d2l.train.loop import Trainer

every_family = pytest.mark.parametrize("name", FAMILIES)


def chat_of(family: Family, **values: Any) -> ChatFormat:
    """The family's chat, as `chat_format` finds it for a tokenizer with a template without tags."""
    return chat_format(family.tokenizer(family.untagged), **values)


# Templates


@every_family
def test_plain_turns_are_written_as_published(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family, current_date=DATE)
    assert chat.template == family.text
    assert chat.render(CONVERSATION, add_generation_prompt=True) == family.asked
    assert chat.render(ANSWERED) == family.answered
    untagged = ChatFormat(chat.tokenizer, family.untagged, "content", DATE)
    assert untagged.render(ANSWERED) == family.answered
    assert not untagged.has_generation_tags


@every_family
def test_answers_and_their_end_tokens_are_supervised_and_nothing_else(name: str) -> None:
    family, chat = FAMILIES[name], chat_of(FAMILIES[name])
    trims = "I am an assistant" + family.end in family.answered
    encoded = chat.encode(ANSWERED)
    answers = ["Hi there", "I am an assistant" if trims else "   I am an assistant   "]
    expected = [family.before + answer + family.end for answer in answers]
    # decoding a piece of a text, a tokenizer of sentencepiece's kind leaves the space out that it begins with
    found = supervised_texts(chat, encoded)
    assert found == [text.removeprefix(" ") if family.sentencepiece else text for text in expected]
    supervised = [token for token, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert supervised == [token for text in expected for token in ids_inside(chat, text)]
    assert chat.decode(encoded.input_ids) == chat.render(ANSWERED)
    several = [*ANSWERED, ANSWERED[0], {"role": "assistant", "content": "Größe: 4\n— 晴 😀"}]
    assert supervision_faults(chat, several) == ()


def ids_inside(chat: ChatFormat, text: str) -> list[int]:
    """The tokens of a text within a longer one that ends with a control token before it."""
    last = next(iter(chat.tokenizer.get_added_vocab()))
    ids = chat.encode_text(last + text)
    return ids[ids.index(chat.tokenizer.get_added_vocab()[last]) + 1 :]


def test_what_a_model_that_can_think_writes_itself() -> None:
    """`content` leaves the empty block of thoughts to the prompt, `sampled` to the model, which then has to learn it."""
    family = FAMILIES["qwen3"]
    sampled = chat_of(family, supervision="sampled")
    assert supervised_texts(sampled, sampled.encode(ANSWERED[2:])) == [
        f"{THOUGHTLESS}   I am an assistant   <|im_end|>"
    ]
    assert sampled.render(ANSWERED) == chat_of(family).render(ANSWERED)
    assert not sampled.render(CONVERSATION, add_generation_prompt=True).endswith("</think>\n\n")


@every_family
@pytest.mark.parametrize("supervision", ["content", "sampled"])
def test_a_prompt_ends_where_supervision_begins_and_the_rest_is_the_answer(name: str, supervision: Any) -> None:
    chat = chat_of(FAMILIES[name], supervision=supervision)
    encoded = chat.encode([{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine."}])
    begin = encoded.supervised.index(True)
    assert encode_prompt(chat, "When?") == encoded.input_ids[:begin]
    end = encoded.input_ids.index(chat.tokenizer.eos_token_id, begin)
    assert decode_answer(chat, encoded.input_ids[begin:end]) == "At nine."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<think>\n\n</think>\n\nAt nine.", "At nine."),
        ("<think>Is it ten?</think>At nine.<|im_end|>", "At nine."),
        ("Is it ten?</think>At nine.", "At nine."),
        ("<think>Is it ten?", ""),
        ("At nine.", "At nine."),
    ],
)
def test_no_thought_leaks_into_an_answer(said: str, expected: str) -> None:
    chat = chat_of(FAMILIES["qwen3"])
    assert decode_answer(chat, chat.encode_text(said)) == expected


@pytest.mark.parametrize("name", ["llama 3", "llama 3.2", "qwen3", "qwen3 instruct", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "developer", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant"}],
    ],
)
def test_what_is_no_plain_turn_is_refused(name: str, turns: list[Any]) -> None:
    with pytest.raises(DataError, match="the chat template refuses"):
        chat_of(FAMILIES[name]).encode(turns)


@every_family
def test_tools_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="without tools"):
        chat_of(FAMILIES[name]).encode(ANSWERED, tools=[{"type": "function", "function": {"name": "f"}}])


def test_thoughts_are_refused() -> None:
    chat = chat_of(FAMILIES["qwen3"])
    for message in ({"content": "<think>Hm</think>x"}, {"content": "x", "reasoning_content": "Hm"}):
        with pytest.raises(DataError, match="without thoughts"):
            chat.encode([ANSWERED[0], {"role": "assistant", **message}])


@pytest.mark.parametrize("name", ["mistral", "mistral tekken", "gemma"])
def test_turns_that_do_not_alternate_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="in turn"):
        chat_of(FAMILIES[name]).encode([ANSWERED[0], ANSWERED[0]])


@pytest.mark.parametrize(
    ("name", "end_of_sequence", "named"),
    [
        ("gemma", "<eos>", None),
        ("llama 3", "<|end_of_text|>", [1, 2]),
        ("qwen3", "<|endoftext|>", 3),
        ("mistral", "</s>", None),
    ],
)
def test_an_answer_stops_where_training_ends_one_and_where_the_model_s_files_say(
    name: str, end_of_sequence: str, named: Any
) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer(family.untagged, eos=end_of_sequence)
    end = tokenizer.get_added_vocab()[family.end]
    rest = named if isinstance(named, list) else [tokenizer.eos_token_id, *([named] if named else [])]
    assert find_stop_ids(chat_format(tokenizer), named) == sorted({end, *rest})


# Which template a tokenizer gets


def test_every_shipped_template_belongs_to_a_family() -> None:
    assert {shipped.name for shipped in SHIPPED} == {family.file for family in FAMILIES.values()}


def test_without_a_template_of_its_own_control_tokens_decide() -> None:
    for name, family in FAMILIES.items():
        assert default_template(family.tokenizer()) == FAMILIES[family.shares_tokens_with or name].text
    chatml = replace(FAMILIES["qwen3"], control=("<|im_start|>", "<|im_end|>"))
    assert default_template(chatml.tokenizer()) == FAMILIES["qwen3 instruct"].text
    lacking = replace(chatml, control=("<|im_start|>",), end="<|im_start|>")
    assert default_template(lacking.tokenizer()) is None


def test_a_template_with_tags_of_its_own_is_kept() -> None:
    family = FAMILIES["gemma3"]
    own = family.text.replace("<start_of_turn>model", "<start_of_turn>reader")
    assert default_template(family.tokenizer(own)) == own


@pytest.mark.parametrize(
    ("name", "published", "other"),
    [
        ("qwen3 instruct", "{%- for message", "{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' -}}{%- for message"),
        ("mistral", "[/INST]", " [/INST]"),
        ("llama 3", " | trim", ""),
        ("gemma3", 'messages[0].content + "\\n\\n"', 'messages[0].content + "\\n"'),
        (
            "qwen3 instruct",
            "{%- else -%}\n        {{- message.content +",
            '{%- else -%}\n        {{- (message.content | trim if message.role == "user" else message.content) +',
        ),
        ("gemma3", '<start_of_turn>model\\n" if', '<start_of_turn>model" if'),
    ],
)
def test_an_own_template_that_renders_other_text_is_kept(name: str, published: str, other: str) -> None:
    """A run never trains on text that its base does not know, unless the configuration names the template."""
    family = FAMILIES[name]
    own = family.untagged.replace(published, other)
    chat = chat_format(family.tokenizer(own))
    assert chat.template == own != family.untagged
    assert not chat.has_generation_tags


def test_a_system_message_that_the_own_template_refuses_decides_nothing() -> None:
    """Gemma 2 refuses one, Gemma 3 does not."""
    refuse = "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}"
    family = FAMILIES["gemma2"]
    assert default_template(family.tokenizer(refuse + family.untagged)) == family.text


def test_a_broken_template_is_reported_where_it_is_used() -> None:
    chat = chat_format(FAMILIES["gemma"].tokenizer("{% if %}"))
    with pytest.raises(ModelError, match="not valid Jinja"):
        chat.encode(ANSWERED)


# Documents

DOCUMENT = " ".join(f"On day {day} the ferry to Brennick leaves at {day % 12}." for day in range(20))


@every_family
def test_affixes_are_those_of_the_template(name: str) -> None:
    family = FAMILIES[name]
    chat = chat_of(family)
    prefix, suffix = chat.context_affixes()
    assert (chat.decode(prefix), chat.decode(suffix)) == family.edges
    message = chat.encode([{"role": "user", "content": DOCUMENT}]).input_ids
    assert [*prefix, *chat.encode_text(DOCUMENT), *suffix] == message


@every_family
def test_a_long_document_is_split_between_affixes(name: str) -> None:
    chat = chat_of(FAMILIES[name])
    prefix, suffix = chat.context_affixes()
    longest = len(prefix) + len(suffix) + len(chat.encode_text(DOCUMENT)) // 4 + 1
    chunks = chunk_document(DOCUMENT, chat, Limits(max_ctx_chunk_len=longest))
    assert len(chunks) == 4
    assert max(map(len, chunks)) <= longest
    assert {(chunk[: len(prefix)], chunk[len(chunk) - len(suffix) :]) for chunk in chunks} == {
        (tuple(prefix), tuple(suffix))
    }
    text = [token for chunk in chunks for token in chunk[len(prefix) : len(chunk) - len(suffix)]]
    assert text == chat.encode_text(DOCUMENT)


# Training


def records() -> Iterator[Record]:
    for day in range(3):
        document = f"The ferry leaves on day {day}. " * (1 + 3 * day)
        yield Record(document, ("When?", "What leaves?"), (f"On day {day}.", "The ferry."), f"a.jsonl:{day}")


# Each family once in `make test`, with one kind of target and the next with the other; both in `make kills`
KINDS = {"attention": ATTENTION, "mlp": MLP}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param(name, targets, id=f"{name}-{kind}", marks=() if (row + column) % 2 == 0 else pytest.mark.slow)
        for row, name in enumerate(FAMILIES)
        for column, (kind, targets) in enumerate(KINDS.items())
    ],
)
def test_a_step_of_training_from_text_to_weights(name: str, targets: tuple[str, ...]) -> None:
    """One step changes what can change, the loss is finite, and with B at zero the first one is the base's own."""
    family, chat = FAMILIES[name], chat_of(FAMILIES[name])
    config = RunConfig(
        **HYPERNETWORK,
        target_modules=targets,
        ctx_encoder_type="per_layer_activations",
        learning_rate=0.01,
        warmup_steps=0,
        gradient_accumulation_steps=1,
        max_packed_inp_len=2000,
        max_packed_ctx_len=2000,
        max_ctx_chunk_len=150,
        max_steps=2,
    )
    tokenized = tokenize_records(list(records()), chat, Limits.of(config), seed=0)
    assert not tokenized.dropped
    base_config = family.base_config(len(chat.tokenizer))
    base = random_base(base_config, plan_load(config, base_config, device="cpu"), seed=0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = Trainer(DocToLora(base, config), tokenized.rows, config)
    assert {name: len(modules) for name, modules in trainer.model.targets.items()} == dict.fromkeys(targets, LAYERS)
    first, second = trainer.step(), trainer.step()
    assert first.label_tokens == sum(query.n_labels for row in tokenized.rows for query in row.queries) > 0
    assert first.grad_norm > 0
    assert second.task_loss < first.task_loss
    moved = {name for name, it in trainer.model.hypernet.named_parameters() if name.startswith("scaler_B") and it.any()}
    assert moved == {f"scaler_B.{name}" for name in targets}
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
