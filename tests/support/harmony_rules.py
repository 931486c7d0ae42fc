"""The rules of a GPT-OSS conversation restated in Python, string by string: the oracle for random conversations.

It is trusted because `test_chat_template.py` holds it to every golden render.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from d2l.data.chat.format import DEFAULT_DATE
from d2l.data.chat.harmony import TEMPLATE
from d2l.io.resources import resource


def system_block(
    tools: Sequence[Any] | None, identity: str, effort: str, builtin_tools: Sequence[str] | None, day: str
) -> str:
    lines = [identity, "Knowledge cutoff: 2024-06", f"Current date: {day}", "", f"Reasoning: {effort}", ""]
    if builtin_tools:
        lines += ["# Tools", ""]
        lines += [section for name, section in BUILTIN.items() if name in builtin_tools]
    lines += ["# Valid channels: analysis, commentary, final. Channel must be included for every message."]
    if tools:
        lines += ["Calls to these tools must go to the commentary channel: 'functions'."]
    return "<|start|>system<|message|>" + "\n".join(lines) + "<|end|>"


def section_of(name: str, end: str) -> str:
    """A builtin section has no rule but its own text, which the golden renders pin: cut it out of the template."""
    text = resource(TEMPLATE).read_text(encoding="utf-8")
    start = text.index(f"## {name}\n")
    return text[start : text.index(end, start) + len(end)] + "\n"


BUILTIN = {
    "browser": section_of("browser", "} // namespace browser"),
    "python": section_of("python", "Depends on the cluster."),
}


def type_text(schema: Any) -> str:
    kind = schema.get("type")
    null = " | null" if schema.get("nullable") else ""
    if kind == "array":
        return f"{element_text(schema.get('items'))}[]{null}"
    if isinstance(kind, list) and kind:
        return " | ".join(kind)
    if schema.get("oneOf"):
        variants = []
        for variant in schema["oneOf"]:
            text = type_text(variant)
            if variant.get("description"):
                text += f"// {variant['description']}"
            if "default" in variant:
                text += f"{' ' * 20}// default: {json.dumps(variant['default'], ensure_ascii=False)}"
            variants.append(text)
        return " | \n".join(variants)
    if kind == "string":
        return " | ".join(f'"{value}"' for value in schema["enum"]) if schema.get("enum") else f"string{null}"
    if kind == "object" and schema.get("properties"):
        required = schema.get("required") or []
        fields = [
            f"{name}{'' if name in required else '?'}: \n{' ' * 16}{type_text(field)}"
            for name, field in schema["properties"].items()
        ]
        return "{\n" + ", ".join(fields) + "}"
    return {"number": "number", "integer": "number", "boolean": "boolean", "object": "object"}.get(str(kind), "any")


def element_text(schema: Any) -> str:
    if not schema:
        return "any"
    plain = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}
    text = plain.get(str(schema.get("type"))) or type_text(schema)
    return "any" if text == "object | object" or len(text) > 50 else text


def tool_text(function: Mapping[str, Any]) -> str:
    head = f"// {function['description']}\ntype {function['name']} = "
    parameters = function.get("parameters") or {}
    if not parameters.get("properties"):
        return head + "() => any;\n\n"
    lines = ""
    for name, schema in parameters["properties"].items():
        if schema.get("description"):
            lines += f"// {schema['description']}\n"
        lines += f"{name}{'' if name in (parameters.get('required') or []) else '?'}: {type_text(schema)}"
        if "default" in schema and schema.get("enum"):
            lines += f", // default: {schema['default']}"
        elif "default" in schema and schema.get("oneOf"):
            lines += f"// default: {schema['default']}"
        elif "default" in schema:
            lines += f", // default: {json.dumps(schema['default'], ensure_ascii=False)}"
        lines += ",\n"
    return head + "(_: {\n" + lines + "}) => any;\n\n"


def developer_block(instructions: str, tools: Sequence[Any] | None) -> str:
    if not instructions and not tools:
        return ""
    text = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    if tools:
        text += "# Tools\n\n## functions\n\nnamespace functions {\n\n"
        text += "".join(tool_text(tool["function"]) for tool in tools) + "} // namespace functions"
    return f"<|start|>developer<|message|>{text}<|end|>"


def assistant_text(message: Mapping[str, Any], later: Sequence[Mapping[str, Any]], ends_in_prompt: bool) -> str:
    analysis = "<|start|>assistant<|channel|>analysis<|message|>{}<|end|>"
    if "tool_calls" in message:
        answered = any(other["role"] == "assistant" and "tool_calls" not in other for other in later)
        reasoning = message.get("content") or message.get("thinking")
        call = message["tool_calls"][0]
        call = call.get("function", call)
        written = analysis.format(reasoning) if reasoning and not answered else ""
        written += (
            f"<|start|>assistant to=functions.{call['name']}<|channel|>commentary {call.get('content_type', 'json')}"
        )
        return f"{written}<|message|>{json.dumps(call['arguments'], ensure_ascii=False)}<|call|>"
    final = "<|start|>assistant<|channel|>final<|message|>" + message["content"]
    if later or ends_in_prompt:
        return final + "<|end|>"
    return (analysis.format(message["thinking"]) if "thinking" in message else "") + final + "<|return|>"


def harmony_text(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI.",
    reasoning_effort: str = "medium",
    builtin_tools: Sequence[str] | None = None,
    day: str = DEFAULT_DATE,
) -> str:
    """The conversation by the rules, as a loop of string pieces; the oracle for random conversations."""
    text = system_block(tools, model_identity, reasoning_effort, builtin_tools, day)
    rest = list(messages)
    instructions = rest.pop(0).get("content", "") if rest[0]["role"] in ("system", "developer") else ""
    text += developer_block(instructions, tools)
    caller = None
    for index, message in enumerate(rest):
        if message["role"] == "user":
            text += f"<|start|>user<|message|>{message['content']}<|end|>"
        elif message["role"] == "tool":
            result = json.dumps(message["content"], ensure_ascii=False)
            assert caller is not None
            text += f"<|start|>functions.{caller} to=assistant<|channel|>commentary<|message|>{result}<|end|>"
        elif message["role"] == "assistant":
            text += assistant_text(message, rest[index + 1 :], add_generation_prompt)
            call = message.get("tool_calls", [None])[0]
            caller = call.get("function", call)["name"] if call else None
    return text + ("<|start|>assistant" if add_generation_prompt else "")
