"""The shipped GPT-OSS template against the oracle's cases and against its rules restated in Python."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.harmony_rules import harmony_text
from support.plain_jinja import plain_jinja
from transformers import PreTrainedTokenizerBase

from d2l.data.chat.format import chat_format
from d2l.data.chat.harmony import TEMPLATE, expected_supervision
from d2l.data.chat.supervision import supervised_texts, supervision_faults
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.errors import DataError
from d2l.io.resources import resource

TEXT = resource(TEMPLATE).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- the oracle's cases


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "golden/chat/golden.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(shared / "tokenizers/gpt-oss"))


def apply(tokenizer: PreTrainedTokenizerBase, case: Mapping[str, Any], **how: Any) -> Any:
    """The template handed to transformers as it is, without anything of d2l around it."""
    return tokenizer.apply_chat_template(
        case["messages"], tools=case["tools"], chat_template=TEXT, current_date=case["date"], **case["kwargs"], **how
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_golden_renders(cases: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    renders = [case for case in cases if "rendered" in case]
    assert len(renders) == 41
    for case in renders:
        assert apply(tokenizer, case, tokenize=False) == case["rendered"], case["name"]
        assert plain_jinja(**arguments(case)) == case["rendered"], case["name"]
        for supervision in ("content", "sampled"):
            found = apply(tokenizer, case, supervision=supervision, return_dict=True, return_assistant_tokens_mask=True)
            mask = found["assistant_masks"]
            assert len(found["input_ids"]) == case["n_tokens"], case["name"]
            assert sha256(" ".join(map(str, found["input_ids"]))) == case["input_ids_sha256"], case["name"]
            assert sum(mask) == case[f"n_{supervision}_tokens"], case["name"]
            assert sha256("".join(map(str, mask))) == case[f"{supervision}_mask_sha256"], case["name"]


def test_golden_errors(cases: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    errors = [case for case in cases if "error" in case]
    assert len(errors) == 6
    for case in errors:
        with pytest.raises(Exception) as raised:  # noqa: PT011 any class will do where the official one is an accident
            apply(tokenizer, case, tokenize=False)
        if case["error"]["explicit"]:
            assert raised.type is jinja2.TemplateError, case["name"]
        with pytest.raises(DataError, match="the chat template refuses"):
            chat_format(tokenizer).encode(case["messages"], tools=case["tools"])


def test_golden_supervision_through_chat_format(
    cases: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """`ChatFormat`, the decoded spans and the restated expectation agree with the oracle's spans."""
    spans_seen = 0
    for case in cases:
        if "rendered" not in case or set(case["kwargs"]) - {"add_generation_prompt"}:
            continue
        prompt = case["kwargs"].get("add_generation_prompt", False)
        for supervision in ("content", "sampled"):
            chat = chat_format(tokenizer, supervision=supervision, current_date=case["date"])
            assert chat.render(case["messages"], tools=case["tools"], add_generation_prompt=prompt) == case["rendered"]
            encoded = chat.encode(case["messages"], tools=case["tools"], add_generation_prompt=prompt)
            spans = [case["rendered"][start:end] for start, end in case[f"{supervision}_spans"]]
            assert supervised_texts(chat, encoded) == spans, case["name"]
            if not prompt:
                assert expected_supervision(case["messages"], supervision) == spans, case["name"]
                assert supervision_faults(chat, case["messages"]) == (), case["name"]
            spans_seen += len(spans)
    assert spans_seen > 50


def arguments(case: Mapping[str, Any]) -> dict[str, Any]:
    # Without null values, which transformers takes out.
    messages = [{k: v for k, v in message.items() if v is not None} for message in case["messages"]]
    return {"day": case["date"], "messages": messages, "tools": case["tools"], **case["kwargs"]}


# ------------------------------------------------------------------------------------------- the restated rules


def test_restatement_agrees_with_the_oracle(cases: list[dict[str, Any]]) -> None:
    """The restatement is trusted only because it gives every golden render itself."""
    for case in cases:
        if "rendered" in case:
            assert harmony_text(**arguments(case)) == case["rendered"], case["name"]


# ------------------------------------------------------------------------------------------- random conversations

texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [" a\n", "\n\n", "{{ x }}", "<|end|>", "😀晴"]
)
names = st.text("abc_", min_size=1, max_size=9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.just(2.5) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
scalars = st.sampled_from(["string", "number", "integer", "boolean", "object", "array", "null", "date"])
kinds = scalars | st.lists(scalars, max_size=3) | st.just(["object", "object"])


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    inner = schemas(depth - 1) if depth else st.just({})
    keys = {
        "type": kinds,
        "description": texts,
        "nullable": st.booleans(),
        "enum": st.lists(texts, max_size=3),
        "default": json_values,
        "items": inner,
        "properties": st.dictionaries(names, inner, max_size=2),
        "required": st.lists(names, max_size=2),
        "oneOf": st.lists(inner, max_size=2),
    }
    return st.fixed_dictionaries({}, optional=keys).map(with_writable_default)


def with_writable_default(schema: dict[str, Any]) -> dict[str, Any]:
    """Beside `enum` and `oneOf` only text is written as a default; anything else is an error (`test_refusals`)."""
    if "default" in schema and (schema.get("enum") or schema.get("oneOf")):
        return {**schema, "default": str(schema["default"])}
    return schema


@st.composite
def tools_of(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(names, schemas(), max_size=3))
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if draw(st.booleans()):
        parameters["required"] = draw(st.lists(st.sampled_from([*properties, "other"]), max_size=2))
    function: dict[str, Any] = {"name": draw(names), "description": draw(texts)}
    if draw(st.booleans()):
        function["parameters"] = parameters
    return {"type": "function", "function": function}


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    call = {"name": draw(names), "arguments": draw(json_values)}
    if draw(st.booleans()):
        call["content_type"] = draw(st.sampled_from(["code", "<|constrain|>json"]))
    return call if draw(st.booleans()) else {"type": "function", "function": call}


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    first = draw(st.sampled_from(["system", "developer", None]))
    messages: list[dict[str, Any]] = [{"role": first, "content": draw(texts)}] if first else []
    for turn in draw(st.lists(st.sampled_from(["user", "final", "call", "result", "critic", "system"]), min_size=1)):
        thinking = {"thinking": draw(texts)} if draw(st.booleans()) else {}
        if turn == "final":
            messages.append({"role": "assistant", "content": draw(texts), **thinking})
        elif turn in ("call", "result"):
            content = {} if thinking.get("thinking") else {"content": draw(texts)}
            turn_calls = draw(st.lists(calls(), min_size=1, max_size=2))
            messages.append({"role": "assistant", "tool_calls": turn_calls, **content, **thinking})
            if turn == "result":
                results = draw(st.lists(json_values.filter(lambda value: value is not None), max_size=2))
                messages += [{"role": "tool", "content": result} for result in results]
        else:
            messages.append({"role": turn, "content": draw(texts)})
    return messages


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    messages=conversations(),
    tools=st.none() | st.lists(tools_of(), max_size=2),
    add_generation_prompt=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "model_identity": texts,
            "reasoning_effort": st.sampled_from(["low", "high"]),
            "builtin_tools": st.lists(st.sampled_from(["browser", "python", "canvas"]), max_size=2),
        },
    ),
)
def test_random_conversations_follow_the_rules(
    messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool, options: dict[str, Any]
) -> None:
    arguments = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **options}
    expected = harmony_text(**arguments)
    for supervision in ("content", "sampled"):
        assert plain_jinja(**arguments, supervision=supervision) == expected


USER = {"role": "user", "content": "x"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "r"}
FINAL = {"role": "assistant", "content": "y"}
HEADER = "<|channel|>final<|message|>"


def record(name: str) -> dict[str, Any]:
    """An object with one text field; its type is 29 characters longer than the name."""
    return {"type": "object", "properties": {name: {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ({}, "p?: any,"),
        ({"type": "string", "nullable": True}, "p?: string | null,"),
        ({"type": "string", "enum": ["a", 1], "nullable": True}, 'p?: "a" | "1",'),
        ({"type": "string", "enum": []}, "p?: string,"),
        ({"type": "string", "enum": ["a"], "default": "a"}, 'p?: "a", // default: a,'),
        ({"type": "string", "default": "a"}, 'p?: string, // default: "a",'),
        ({"type": "string", "default": None}, "p?: string, // default: null,"),
        ({"type": "integer", "nullable": True, "default": 0}, "p?: number, // default: 0,"),
        ({"type": "object", "nullable": True, "default": {"é": "<&>"}}, 'p?: object, // default: {"é": "<&>"},'),
        ({"type": "object", "properties": {}}, "p?: object,"),
        ({"properties": {"x": {"type": "string"}}}, "p?: any,"),
        ({"type": "null"}, "p?: any,"),
        ({"type": []}, "p?: any,"),
        ({"type": ["integer", "array"]}, "p?: integer | array,"),
        ({"type": ["array"], "items": {"type": "string"}}, "p?: array,"),
        ({"anyOf": [{"type": "string"}]}, "p?: any,"),
        ({"type": "string", "oneOf": [{"type": "number"}], "default": "1"}, "p?: number// default: 1,"),
        ({"oneOf": [{"description": "d", "default": 1}, {}]}, f"p?: any// d{' ' * 20}// default: 1 | \nany,"),
        ({"type": "array", "nullable": True}, "p?: any[] | null,"),
        ({"type": "array", "items": {}}, "p?: any[],"),
        ({"type": "array", "items": {"type": "string", "enum": ["a"], "nullable": True}}, "p?: string[],"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "p?: number[][],"),
        ({"type": "array", "items": {"type": ["string", "null"]}}, "p?: string | null[],"),
        ({"type": "array", "items": {"type": ["object", "object"]}}, "p?: any[],"),
        ({"type": "array", "items": {"type": "object"}}, "p?: object[],"),
        ({"type": "array", "items": {"type": "date"}}, "p?: any[],"),
        ({"type": "array", "items": record("x" * 21)}, f"p?: {{\n{'x' * 21}?: \n{' ' * 16}string}}[],"),
        ({"type": "array", "items": record("x" * 22)}, "p?: any[],"),
        (
            {"type": "object", "properties": {"x": record("z"), "y": {"default": 1}}, "required": ["x", "p"]},
            f"p?: {{\nx: \n{' ' * 16}{{\nz?: \n{' ' * 16}string}}, y?: \n{' ' * 16}any}},",
        ),
        ({"description": "one\ntwo", "type": "boolean"}, "// one\ntwo\np?: boolean,"),
    ],
)
def test_parameter_types(schema: dict[str, Any], line: str) -> None:
    tool = {"function": {"name": "f", "description": "d", "parameters": {"properties": {"p": schema}}}}
    text = plain_jinja(messages=[USER], tools=[tool])
    assert f"type f = (_: {{\n{line}\n}}) => any;\n\n}} // namespace functions<|end|>" in text
    assert text == harmony_text([USER], [tool])


@pytest.mark.parametrize(
    ("messages", "tools", "explicit"),
    [
        ([RESULT], None, True),
        ([CALL, RESULT, FINAL, RESULT], None, True),
        ([{**FINAL, "content": HEADER}, USER], None, True),
        ([{**FINAL, "thinking": HEADER}, USER], None, True),
        ([{**CALL, "content": HEADER}], None, True),
        ([{**CALL, "content": "a", "thinking": "b"}, FINAL], None, True),
        ([{"role": "user"}], None, False),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], None, False),
        ([{"role": "assistant", "thinking": "t"}], None, False),
        ([{"role": "assistant", "tool_calls": []}], None, False),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], None, False),
        ([{"role": "assistant", "tool_calls": [{"arguments": {}}]}], None, False),
        ([CALL, {"role": "tool"}], None, False),
        ([], None, False),
        ([USER], [{"name": "flat", "description": "d"}], False),
        ([USER], [{"function": {"name": "f", "description": "d", "parameters": {"properties": {
            "a": {"type": "integer", "enum": [1, 2], "default": 1}}}}}], False),
    ],
)  # fmt: skip
def test_refusals(messages: list[Any], tools: list[Any] | None, explicit: bool) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError)) as raised:
        plain_jinja(messages=messages, tools=tools)
    assert (raised.type is jinja2.TemplateError) == explicit
