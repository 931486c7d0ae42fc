"""The shipped tiny tokenizer, chat formats, affixes and harmony outputs; supervision is in `test_supervision.py`."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_formats import ANSWER, CHATML, PLAIN, QUESTION, TINY, generic, tiny
from support.tiny_tokenizer import VOCABULARY_SIZE, build_tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerBase

from d2l.data.chat.format import DEFAULT_DATE, chat_format, default_template
from d2l.data.chat.harmony import CONTROL_TOKENS, ChannelMessage, final_text, parse_channels
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.errors import ConfigError, DataError, ModelError
from d2l.io.resources import resource

harmony = chat_format(tiny)


# ------------------------------------------------------------------------------------------------- tiny tokenizer


def test_shipped_tokenizer_is_what_its_builder_builds() -> None:
    files = build_tiny_tokenizer()
    for name, text in files.items():
        assert (resource(TINY) / name).read_text(encoding="utf-8") == text, name
    assert len(files["tokenizer.json"].encode()) < 60_000


def test_shipped_tokenizer_splits_like_the_real_one() -> None:
    assert len(tiny) == VOCABULARY_SIZE == 1024
    assert [tiny.bos_token, tiny.eos_token, tiny.pad_token] == ["<|startoftext|>", "<|return|>", "<|endoftext|>"]
    assert len(harmony.context_affixes()[0]) <= 60
    assert tiny.tokenize("The value of red fox is 0471.") == [
        *("The", "Ġvalue", "Ġof", "Ġred", "Ġfox", "Ġis", "Ġ", "0", "4", "7", "1", "."),
    ]


def test_shipped_control_tokens_keep_the_real_order(shared: Path) -> None:
    ours, real = tiny.get_added_vocab(), load_tokenizer(str(shared / "tokenizers/gpt-oss")).get_added_vocab()
    names = {*CONTROL_TOKENS, "<|startoftext|>", "<|endoftext|>"}
    assert {real[name] - ours[name] for name in names} == {199_998 - 1008}


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(st.characters(codec="utf-8")))
def test_shipped_tokenizer_loses_nothing(text: str) -> None:
    assert tiny.decode(tiny(text, add_special_tokens=False)["input_ids"]) == text


# ------------------------------------------------------------------------------------------------------ encoding


def test_generation_prompt_and_tools() -> None:
    tools = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
    text = harmony.render([QUESTION], tools=tools, add_generation_prompt=True)
    assert "type now = () => any;" in text
    assert text.endswith("<|start|>assistant")
    assert harmony.encode([QUESTION], tools=tools, add_generation_prompt=True).input_ids == harmony.encode_text(text)


def test_no_token_is_added_at_the_start() -> None:
    """A tokenizer that opens every text with a BOS token, under a template that writes one too."""
    tokenizer = copy.deepcopy(tiny)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"].count(tokenizer.bos_token_id) == 1
    chat = chat_format(tokenizer, template="{{ bos_token }}" + CHATML)
    assert chat.encode([QUESTION, ANSWER]).input_ids.count(tokenizer.bos_token_id) == 1
    prefix, suffix = chat.context_affixes()
    assert (prefix + chat.encode_text("a") + suffix).count(tokenizer.bos_token_id) == 1


# ----------------------------------------------------------------------------------------------- frozen date


def test_the_date_is_frozen_and_part_of_the_fingerprint() -> None:
    assert f"Current date: {DEFAULT_DATE}\n" in harmony.render([QUESTION])
    other = chat_format(tiny, current_date="2031-03-14")
    assert "Current date: 2031-03-14\n" in other.render([QUESTION])
    assert other.fingerprint != harmony.fingerprint


def test_a_template_with_a_clock_of_its_own_is_frozen_too() -> None:
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d.%-m.%y %H:%M') }}{% endif %}"
    chat = chat_format(tiny, template="\n{{ current_date }} " + clock + CHATML, current_date="2024-02-09")
    assert chat.render([QUESTION]).startswith("\n2024-02-09 09 Feb 2024, 9.2.24 00:00<|start|>user")


def test_fingerprint_covers_template_and_supervision() -> None:
    same = chat_format(tiny, template=harmony.template, supervision="content", current_date=DEFAULT_DATE)
    assert same.fingerprint == harmony.fingerprint
    assert chat_format(tiny, template=harmony.template + " ").fingerprint != harmony.fingerprint
    assert chat_format(tiny, supervision="sampled").fingerprint != harmony.fingerprint


# ---------------------------------------------------------------------------------------------------- affixes


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8")))
def test_affixes_with_a_document_are_the_rendered_message(document: str) -> None:
    for chat in (harmony, chat_format(tiny, template=CHATML.replace("+ '\n'", "+ '<|message|>'"))):
        prefix, suffix = chat.context_affixes()
        whole = chat.encode([{"role": "user", "content": document}]).input_ids
        assert prefix + chat.encode_text(document) + suffix == whole


@pytest.mark.parametrize("template", [CHATML, PLAIN, PLAIN.replace("User: ", "User")])
@pytest.mark.parametrize("document", ["lower case", "Upper.", "\n edges \n"])
def test_affixes_that_touch_the_document_keep_its_text(template: str, document: str) -> None:
    chat = chat_format(tiny, template=template)
    prefix, suffix = chat.context_affixes()
    text = chat.render([{"role": "user", "content": document}])
    assert tiny.decode(prefix + chat.encode_text(document) + suffix) == text


def test_affixes_hold_the_preamble() -> None:
    prefix, suffix = harmony.context_affixes()
    assert harmony.decode(prefix).startswith("<|start|>system<|message|>You are ChatGPT")
    assert harmony.decode(prefix).endswith("<|end|><|start|>user<|message|>")
    assert tiny.decode(suffix) == "<|end|>"


@pytest.mark.parametrize(
    "template",
    [
        "no user",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{{ messages[0].content }} {{ messages[0].content }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_affixes_need_the_user_message_as_it_stands(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        chat_format(tiny, template=template).context_affixes()


# ------------------------------------------------------------------------------------------- tokenizers and errors


def test_default_template_follows_the_vocabulary() -> None:
    assert default_template(tiny) == resource("chat_templates/openai/gpt-oss-20b.jinja").read_text("utf-8")
    tokenizer = copy.deepcopy(generic)
    assert default_template(tokenizer) is None
    with pytest.raises(ModelError, match="--set chat_template=FILE"):
        chat_format(tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "other"}
    assert default_template(tokenizer) == CHATML
    tokenizer.chat_template = CHATML
    assert chat_format(tokenizer).template == CHATML


def test_slow_tokenizers_are_refused() -> None:
    tokenizer = Mock(spec=PreTrainedTokenizerBase, is_fast=False, name_or_path="slow/model")
    with pytest.raises(ModelError, match="slow/model"):
        chat_format(tokenizer)


def test_conversations_that_the_template_refuses() -> None:
    with pytest.raises(DataError, match="channel header"):
        harmony.encode([QUESTION, {"role": "assistant", "content": "<|channel|>final<|message|>x"}])
    with pytest.raises(DataError, match="content"):
        harmony.encode([QUESTION, {"role": "assistant"}])
    with pytest.raises(DataError, match="empty"):
        harmony.encode([])
    with pytest.raises(ModelError, match="line 2"):
        chat_format(tiny, template="a\n{% if %}").encode([QUESTION])
    with pytest.raises(ModelError, match="refuses a question"):
        chat_format(tiny, template="{{ raise_exception('no') }}").has_generation_tags  # noqa: B018
    with pytest.raises(ConfigError, match="current_date: '2025-02-30'"):
        chat_format(tiny, current_date="2025-02-30")


@pytest.mark.parametrize("content", [None, "not json", '{"model": {"type": "unknown"}}'])
def test_load_tokenizer_reports_what_is_missing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="tokenizer_name_or_path"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model_type", ["gemma", "qwen3_moe", "gpt2", "bert"])
def test_a_folder_with_a_config_alone_has_no_tokenizer(tmp_path: Path, model_type: str) -> None:
    """transformers makes one of special tokens for it, which encodes every text as nothing or as unknown."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no vocabulary is there\nexpected a folder with tokenizer.json"):
        load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------------------------------------ harmony outputs


@pytest.mark.parametrize(
    ("text", "prefilled", "messages", "final"),
    [
        ("", None, [], ""),
        ("<|channel|>final<|message|>Blue.<|return|>", None, [("final", "Blue.")], "Blue."),
        (
            "<|channel|>analysis<|message|>Hm\n<|end|><|start|>assistant<|channel|>final<|message|>Blue.<|return|>",
            None,
            [("analysis", "Hm\n"), ("final", "Blue.")],
            "Blue.",
        ),
        ("<|channel|>analysis<|message|>never done", None, [("analysis", "never done")], ""),
        ("<|channel|>final<|message|>cut o", None, [("final", "cut o")], "cut o"),
        ("Blue.<|return|>", "final", [("final", "Blue.")], "Blue."),
        ("Hm<|end|><|start|>assistant<|channel|>final<|message|>B", "analysis", [("analysis", "Hm"), ("final", "B")], "B"),
        ("Bl<|channel|>final<|message|>Blue.<|return|>", "final", [("final", "Bl"), ("final", "Blue.")], "Blue."),
        ("Blue.", None, [], ""),
        (
            " to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
            None,
            [("commentary", "{}", "functions.now")],
            "",
        ),
        (
            "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
            None,
            [("commentary", "{}", "functions.now")],
            "",
        ),
        ("<|start|>user<|message|>a < b<|end|><|start|>assistant", None, [(None, "a < b")], ""),
    ],
)  # fmt: skip
def test_channels(text: str, prefilled: str | None, messages: list[tuple[Any, ...]], final: str) -> None:
    assert parse_channels(text, prefilled) == [ChannelMessage(*message) for message in messages]
    assert final_text(text, prefilled) == final
