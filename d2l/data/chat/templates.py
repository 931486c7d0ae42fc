"""Shipped training templates for formats other than harmony, and the ones that fit a tokenizer."""

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
    """Shipped chat template with generation tags. `control_tokens` mark its format, each one token of the vocabulary."""

    name: str
    control_tokens: frozenset[str]

    @property
    def text(self) -> str:
        """Jinja text of the template."""
        return resource(self.name).read_text(encoding="utf-8")


# Among templates with the same control tokens, the first is the default for tokenizers without a template.
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


def find_shipped_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[ShippedTemplate]:
    """Yield the shipped templates whose control tokens are all in the tokenizer's vocabulary, in order of preference."""
    vocabulary = set(tokenizer.get_added_vocab())
    return (template for template in SHIPPED if vocabulary >= template.control_tokens)


def renders_alike(ours: Render, theirs: Render) -> bool:
    """Return whether `ours` renders plain turns as `theirs` does, for all turns that `theirs` accepts."""
    return all(
        expected is None or expected == _try_render(ours, messages, prompt)
        for messages in PLAIN_TURNS
        for prompt in (False, True)
        for expected in [_try_render(theirs, messages, prompt)]
    )


def _try_render(render: Render, messages: Messages, prompt: bool) -> str | None:
    """Render a conversation; None where the template refuses it."""
    try:
        return render(messages, add_generation_prompt=prompt)
    except DataError:
        return None
