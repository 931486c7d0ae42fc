"""GPT-OSS's harmony format outside the template: its tokens, parsing of outputs, and the expected supervision.

A message reads `<|start|>author<|channel|>channel<|message|>content<|end|>`; `<|return|>` and `<|call|>` end a message
and the turn. The model starts every turn right after `<|start|>assistant`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Supervision = Literal["content", "sampled"]

TEMPLATE = "chat_templates/openai/gpt-oss-20b.jinja"
CONTROL_TOKENS = frozenset(
    f"<|{name}|>" for name in ["start", "end", "message", "channel", "constrain", "return", "call"]
)

_MESSAGE = re.compile(
    r"(?:<\|start\|>(?P<author>[^<]*))?(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(?P<content>.*?)(?=<\|(?:start|end|message|channel|constrain|return|call)\|>|\Z)",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True)
class ChannelMessage:
    """Message of an output: `channel` is None where the header names none, `recipient` is set for tool calls only."""

    channel: str | None
    content: str
    recipient: str | None = None


def has_harmony_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether every control token of harmony is one token of the tokenizer."""
    return set(tokenizer.get_added_vocab()) >= CONTROL_TOKENS


def parse_channels(text: str, prefilled: str | None = None) -> list[ChannelMessage]:
    """Parse an output of the model into messages.

    Args:
        text: output after `<|start|>assistant`, decoded with `skip_special_tokens=False`.
        prefilled: channel whose header ends the prompt, so that `text` starts with content; None: there is none.
    """
    if prefilled is not None:
        text = f"<|start|>assistant<|channel|>{prefilled}<|message|>{text}"
    elif not text.startswith("<|start|>"):
        text = f"<|start|>assistant{text}"
    messages = []
    for match in _MESSAGE.finditer(text):
        author, channel = match["author"] or "", match["channel"] or ""
        recipient = _RECIPIENT.search(f"{author} {channel}")
        name = channel.split()[0] if channel.split() else None
        messages.append(ChannelMessage(name, match["content"], recipient[1] if recipient else None))
    return messages


def final_text(text: str, prefilled: str | None = None) -> str:
    """Return the last `final` message of an output, without its header: the text for the user; empty if there is none.

    Args:
        text, prefilled: as in `parse_channels`.
    """
    finals = [message.content for message in parse_channels(text, prefilled) if message.channel == "final"]
    return finals[-1] if finals else ""


def expected_supervision(messages: Sequence[Mapping[str, Any]], supervision: Supervision) -> list[str]:
    """Return the texts that a harmony template must mark in a conversation, derived from the messages alone.

    It restates the format's rules for assistant turns and reads no template, so it can verify one. `content`: each
    message with its end token, without headers. `sampled`: each turn from its first header to its stop token.

    Args:
        messages: a conversation that ends without a generation prompt.
    """
    texts: list[str] = []
    for parts in _assistant_turns(messages):
        if supervision == "content":
            texts += [content for _, content in parts]
        else:
            texts.append("<|start|>assistant".join(header + content for header, content in parts))
    return texts


def _assistant_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the (header, content) pairs of each assistant message."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        names = ("thinking", "reasoning_content", "reasoning")  # transformers passes each of them as `thinking`
        thinking = next((message[name] for name in names if message.get(name) is not None), None)
        is_last = index == len(messages) - 1
        if calls := message.get("tool_calls"):
            later = [other for other in messages[index + 1 :] if other["role"] == "assistant"]
            is_answered = any(not other.get("tool_calls") for other in later)
            reasoning = None if is_answered else message.get("content") or thinking or None
            call = calls[0].get("function") or calls[0]
            header = f" to=functions.{call['name']}<|channel|>commentary {call.get('content_type', 'json')}<|message|>"
            content = json.dumps(call["arguments"], ensure_ascii=False) + "<|call|>"
        else:
            reasoning = thinking if is_last else None
            header = "<|channel|>final<|message|>"
            content = message["content"] + ("<|return|>" if is_last else "<|end|>")
        analysis = [("<|channel|>analysis<|message|>", reasoning + "<|end|>")] if reasoning is not None else []
        yield [*analysis, (header, content)]
