"""The training templates that are shipped besides harmony's, and which of them a tokenizer can write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2l.data.chat.conversations import PLAIN_TURNS
from d2l.errors import DataError
from d2l.io.resources import resource

Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]  # `ChatFormat.render`

_LLAMA_3 = frozenset({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})
_LLAMA_3_1 = _LLAMA_3 | {"<|eom_id|>", "<|python_tag|>"}
_CHATML = frozenset({"<|im_start|>", "<|im_end|>"})
_MISTRAL = frozenset({"<s>", "</s>", "[INST]", "[/INST]"})


@dataclass(frozen=True)
class ShippedTemplate:
    """A chat template with generation tags. `control_tokens`: what marks its format, each one token of the vocabulary."""

    name: str
    control_tokens: frozenset[str]

    @property
    def text(self) -> str:
        return resource(self.name).read_text(encoding="utf-8")


# Of those with the same control tokens, the first is for tokenizers without a template of their own.
SHIPPED = (
    ShippedTemplate("chat_templates/meta-llama/Llama-3.1-8B-Instruct.jinja", _LLAMA_3_1),
    ShippedTemplate("chat_templates/meta-llama/Llama-3.2-3B-Instruct.jinja", _LLAMA_3_1),
    ShippedTemplate("chat_templates/meta-llama/Meta-Llama-3-8B-Instruct.jinja", _LLAMA_3),
    ShippedTemplate("chat_templates/Qwen/Qwen3-8B.jinja", _CHATML | {"<think>", "</think>"}),
    ShippedTemplate("chat_templates/Qwen/Qwen3-4B-Instruct-2507.jinja", _CHATML),
    ShippedTemplate("chat_templates/mistralai/Mistral-7B-Instruct-v0.3.jinja", _MISTRAL),
    ShippedTemplate("chat_templates/mistralai/Mistral-Nemo-Instruct-2407.jinja", _MISTRAL),
    ShippedTemplate("chat_templates/google/gemma-3-1b-it.jinja", frozenset({"<start_of_turn>", "<end_of_turn>"})),
)


def writable_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[ShippedTemplate]:
    """The shipped templates whose control tokens are all tokens of this tokenizer, in order of preference."""
    vocabulary = set(tokenizer.get_added_vocab())
    return (template for template in SHIPPED if vocabulary >= template.control_tokens)


def shipped_note(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a message that asks for another template: which are shipped for this tokenizer, if any."""
    names = [template.name for template in writable_templates(tokenizer)]
    return f"; shipped for its control tokens: {', '.join(names)}" if names else ""


def writes_as(ours: Render, theirs: Render) -> bool:
    """Whether a template writes plain turns, with and without a generation prompt, as another that accepts them does."""
    return all(
        expected is None or expected == _text(ours, messages, prompt)
        for messages in PLAIN_TURNS
        for prompt in (False, True)
        for expected in [_text(theirs, messages, prompt)]
    )


def _text(render: Render, messages: Messages, prompt: bool) -> str | None:
    """None where the template refuses these turns."""
    try:
        return render(messages, add_generation_prompt=prompt)
    except DataError:
        return None
