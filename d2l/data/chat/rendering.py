"""Rendering of conversations by a chat template, with a frozen date, to text and the ranges that the assistant says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from d2l.data.chat.harmony import TEMPLATE, Supervision
from d2l.data.chat.templates import SHIPPED, Messages
from d2l.data.chat.trial import why_not_bounded
from d2l.errors import DataError, ModelError
from d2l.io.resources import resource

# Prepended to every template. The macro replaces transformers' clock by the frozen date, in any format. The comment
# prevents transformers' warning about a missing tag: which tokens are supervised is measured here.
_PRELUDE = (
    "{#- {% generation %} -#}"
    "{%- macro strftime_now(format) -%}"
    "{%- set result = namespace(text=format) -%}"
    "{%- for directive, value in frozen_clock.items() -%}"
    "{%- set result.text = result.text.replace(directive, value) -%}"
    "{%- endfor -%}"
    "{{- result.text -}}"
    "{%- endmacro +%}"
)
_DIRECTIVES = [f"%{letter}" for letter in "aAbBcdHIjmMpSuUwWxXyYZz"]
_UNPADDED = [f"%-{letter}" for letter in "dHIjmMS"]
_TOO_MUCH = (OverflowError, MemoryError, RecursionError)  # a range beyond the sandbox's limit, text beyond the memory


@dataclass(frozen=True)
class Renderer:
    """Chat template with its variables: the tokenizer's special tokens, supervision and date."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    supervision: Supervision
    current_date: str

    def render(
        self, messages: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation; return the text and the ranges of characters in the template's generation tags.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the template is not valid Jinja, or does not end within bounded time and memory.
        """
        if self._is_unbounded:
            raise ModelError(
                f"the chat template cannot be used: {self._is_unbounded}, for a question with its answer\n"
                "pass another template: --set chat_template=FILE"
            )
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            if not turns:
                raise ValueError("the conversation is empty")
            rendered: Any = render_jinja_template(
                conversations=[turns],
                tools=None if tools is None else list(tools),
                chat_template=_PRELUDE + self.template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError, *_TOO_MUCH) as error:
            raise DataError(f"the chat template refuses {str(messages)[:300]}: {error}") from error
        (text,), (spans,) = rendered
        return text, spans

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """Variables of the template besides the conversation."""
        day = date.fromisoformat(self.current_date)
        clock = {directive: day.strftime(directive) for directive in _DIRECTIVES}
        clock |= {directive: day.strftime(directive.replace("-", "")).lstrip("0") or "0" for directive in _UNPADDED}
        own = {"supervision": self.supervision, "current_date": self.current_date, "frozen_clock": clock}
        return {**self.tokenizer.special_tokens_map, **own}

    @cached_property
    def _is_unbounded(self) -> str:
        """Why a foreign template must not be used; shipped ones are known to end."""
        if self.template in _shipped_texts():
            return ""
        return why_not_bounded(_PRELUDE + self.template, json.dumps(self._variables, default=str, sort_keys=True))


def mark_supervised(encoding: Any, spans: Sequence[tuple[int, int]], length: int) -> list[bool]:
    """Mark the tokens of ranges of characters, [T]; as transformers does, up to the end where a range's end has no token."""
    supervised = [False] * length
    for start, stop in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
        if first is None:
            break
        after = last + 1 if last else length
        supervised[first:after] = [True] * (after - first)
    return supervised


@cache
def _shipped_texts() -> frozenset[str]:
    return frozenset([resource(TEMPLATE).read_text(encoding="utf-8"), *(shipped.text for shipped in SHIPPED)])
