"""Supervised tokens, decoded: correct spans on random conversations, and planted faults found."""

import logging
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_formats import ANSWER, CHATML, PLAIN, QUESTION, UNTAGGED, generic, tiny

from d2l.data.chat.format import chat_format
from d2l.data.chat.supervision import supervised_texts, supervision_faults

harmony = chat_format(tiny)


@pytest.mark.parametrize(
    ("supervision", "expected"),
    [
        ("content", ["Hm — 晴😀<|end|>", "  Blau 👍🏽\n<|return|>"]),
        (
            "sampled",
            [
                "<|channel|>analysis<|message|>Hm — 晴😀<|end|>"
                "<|start|>assistant<|channel|>final<|message|>  Blau 👍🏽\n<|return|>"
            ],
        ),
    ],
)
def test_supervised_spans(supervision: Any, expected: list[str]) -> None:
    chat = chat_format(tiny, supervision=supervision)
    messages = [QUESTION, {"role": "assistant", "thinking": "Hm — 晴😀", "content": "  Blau 👍🏽\n"}]
    encoded = chat.encode(messages)
    assert len(encoded.input_ids) == len(encoded.supervised)
    assert tiny.decode(encoded.input_ids) == chat.render(messages)
    assert supervised_texts(chat, encoded) == expected
    assert supervision_faults(chat, messages) == ()


random_text = st.text(st.characters(codec="utf-8")) | st.sampled_from(["\n\n", " ", "😀", "👍🏽", "{% generation %}"])
random_answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": random_text}, optional={"thinking": random_text}
)
random_call = st.builds(
    lambda name, arguments, thinking: {
        "role": "assistant",
        "thinking": thinking,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    },
    st.text("abc_", min_size=1),
    st.dictionaries(st.text("ab", min_size=1), random_text | st.integers(), max_size=2),
    random_text,
)
random_user = st.builds(lambda text: {"role": "user", "content": text}, random_text)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    messages=st.lists(random_user | random_answer | random_call, min_size=1, max_size=5),
    supervision=st.sampled_from(["content", "sampled"]),
)
def test_supervised_ids_decode_to_the_assistant_messages(messages: list[Any], supervision: Any) -> None:
    chat = chat_format(tiny, supervision=supervision)
    assert supervision_faults(chat, messages) == ()
    if supervision == "content":
        supervised = "".join(supervised_texts(chat, chat.encode(messages)))
        for message in messages:
            if message["role"] == "assistant" and "content" in message:
                assert message["content"] in supervised


# --------------------------------------------------------------------------------------- what tags really do

_BODY = "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
FAULTS = {
    "no tags": UNTAGGED,
    "tags in a comment": UNTAGGED + "{# {% generation %}{% endgeneration %} #}",
    "tags in a macro": (
        "{% macro write(message) %}<|start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}" + _BODY + "{% else %}{{ message.content }}<|end|>{% endif %}\n"
        "{% endmacro %}{% for message in messages %}{{ write(message) }}{% endfor %}"
    ),
    "stop token outside": CHATML.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"),
    "the user's turn": CHATML.replace("== 'assistant'", "== 'user'"),
    "header inside": CHATML.replace(_BODY, "{% generation %}note {{ message.content }}<|end|>{% endgeneration %}"),
    "content cut": CHATML.replace(_BODY, _BODY.replace("message.content", "message.content[:2]")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    chat = chat_format(generic, template=FAULTS[name])
    assert supervision_faults(chat, [QUESTION, ANSWER]), name
    assert chat.has_generation_tags == (name not in ("no tags", "tags in a comment"))


@pytest.mark.parametrize("template", [CHATML, PLAIN, CHATML.replace("+ message.role +", "+ message['role'] +")])
def test_other_formats_have_no_faults(template: str) -> None:
    chat = chat_format(generic, template=template)
    assert chat.has_generation_tags
    assert supervision_faults(chat, [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "晴 😀"}]) == ()


_FINAL = """{{- "<|start|>assistant" + header -}}
            {%- generation -%}{{- said -}}{%- endgeneration -%}"""
_SAY = """{%- macro say(header, said) -%}
    {{- header -}}{%- generation -%}{{- said -}}{%- endgeneration -%}
{%- endmacro -%}"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("{{- said -}}{%- endgeneration -%}", "{%- endgeneration -%}{{- said -}}"),
        ("{%- generation -%}{{- said -}}{%- endgeneration -%}", "{{- said -}}"),
        (_FINAL, _SAY + '{{- say("<|start|>assistant" + header, said) -}}'),
        ('supervision == "sampled"', 'supervision == "content"'),
    ],
    ids=["end token outside", "no tags", "tags in a macro", "wrong convention"],
)
def test_planted_faults_in_harmony_are_found(right: str, wrong: str) -> None:
    assert harmony.template.count(right) == 1
    chat = chat_format(tiny, template=harmony.template.replace(right, wrong))
    assert chat.render([QUESTION, ANSWER]) == harmony.render([QUESTION, ANSWER])
    assert supervision_faults(harmony, [QUESTION, ANSWER]) == ()
    assert supervision_faults(chat, [QUESTION, ANSWER])


def test_no_tags_is_measured_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = Mock()
    monkeypatch.setattr(logging.getLogger("transformers.utils.chat_template_utils"), "warning_once", warning)
    chat = chat_format(tiny, template=UNTAGGED)
    encoded = chat.encode([QUESTION, ANSWER])
    assert encoded.input_ids == chat_format(tiny, template=CHATML).encode([QUESTION, ANSWER]).input_ids
    assert not any(encoded.supervised)
    assert not warning.called
    assert not chat.has_generation_tags
    tiny.apply_chat_template([QUESTION], chat_template=UNTAGGED, return_assistant_tokens_mask=True)
    assert warning.called  # as it does without ChatFormat
