"""Chat format of a run: a tokenizer, a chat template, a supervision convention and a date.

It turns conversations into token ids and marks the supervised ones. Properties of a template are measured by rendering
with it, never read from its text: a generation tag inside a comment or a macro looks right and has no effect.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2l.data.characters import characters_per_token
from d2l.data.chat.control_tokens import Contents, ControlTokens, Hidden
from d2l.data.chat.conversations import PROBE
from d2l.data.chat.harmony import TEMPLATE, Supervision, has_harmony_tokens
from d2l.data.chat.rendering import Renderer, mark_supervised
from d2l.data.chat.templates import Messages, find_shipped_templates, renders_alike
from d2l.errors import ConfigError, DataError, ModelError
from d2l.io.resources import resource

# A template that prints today's date would give other ids every day. This is the release day of GPT-OSS: after the
# knowledge cutoff in its system message, and the date of the published examples.
DEFAULT_DATE = "2025-08-05"

_SENTINELS = ("Quartz reflects light", "Velvet absorbs sound")  # different first and last letters


@dataclass(frozen=True)
class Encoded:
    """Token ids `input_ids` [T] of a conversation and, for each of them, whether it is `supervised` [T]."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class ChatFormat:
    """Tokenizer with its chat template, supervision convention and date; see `chat_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    supervision: Supervision
    current_date: str
    control_tokens: Contents = "text"

    def render(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation as text.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the template is not valid Jinja, or does not end.
        """
        hidden = self._hidden(messages, tools)
        return self.control.reveal(self._rendered(messages, tools, add_generation_prompt, hidden)[0], hidden)

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> Encoded:
        """Encode a conversation as token ids with its supervised positions, never truncated and without added tokens.

        Control tokens in the messages are encoded as `control_tokens` says; those of the template are control tokens. A
        template without working generation tags supervises nothing, which is no error here: see `has_generation_tags`.

        Raises:
            DataError: the template refuses the conversation, or it holds control tokens and they are refused.
            ModelError: the template is not valid Jinja, or does not end.
        """
        hidden = self._hidden(messages, tools)
        text, spans = self._rendered(messages, tools, add_generation_prompt, hidden)
        encoding: Any
        if hidden:
            ids, encoding = self.control.encode(text, hidden)
        else:
            encoding = self.tokenizer(text, add_special_tokens=False)
            ids = list(encoding["input_ids"])
        return Encoded(ids, mark_supervised(encoding, spans, len(ids)))

    def encode_contents(self, text: str) -> list[int]:
        """Encode a document as token ids, without a template and added tokens, its control tokens as the run says.

        Raises:
            DataError: it holds control tokens and they are refused.
        """
        return list(self._encoded_contents(text)["input_ids"])

    def locate_contents(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode_contents`, and the characters of the document that each is for: from, up to.

        Raises:
            DataError: it holds control tokens and they are refused.
        """
        encoding = self._encoded_contents(text, return_offsets_mapping=True)
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])

    def encode_text(self, text: str) -> list[int]:
        """Encode text as token ids, without a template and without added tokens; control tokens in it are read as such."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on the tokens of a text, from its number of characters alone; 0 where none is known."""
        return math.ceil(len(text) / self._characters_per_token) if self._characters_per_token else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids as text, control tokens included and white space unchanged."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def context_affixes(self) -> tuple[list[int], list[int]]:
        """Return the ids before and after a document that is a user message of its own, system preamble included.

        `prefix + encode_contents(document) + suffix` is that message. Where control tokens enclose the document (as in
        GPT-OSS), no token spans its edges, so these are exactly the ids of the rendered message. Where plain text does
        (a newline, `User: `), rendering might merge it with the document's first or last letters into one token; here
        the text is the same and the boundary stays at the document's edge, as chunks of a document require.

        Raises:
            ModelError: the template does not write a user message as it stands.
        """
        return list(self._affixes[0]), list(self._affixes[1])

    @cached_property
    def has_generation_tags(self) -> bool:
        """Whether the template marks any token of a plain answer as supervised, measured by encoding one."""
        try:
            return any(self.encode(PROBE).supervised)
        except DataError as error:
            raise ModelError(
                f"the chat template cannot be used: it refuses a question with its answer\n{error}"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the template's text, its options and what becomes of control tokens in texts, in hexadecimal."""
        parts = (self.template, self.supervision, self.current_date, self.control_tokens)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of everything in the tokenizer that shapes ids, and its special tokens, in hexadecimal."""
        self.encode_text("")  # a call clears the padding and truncation that a tokenizer.json may set
        special = [self.tokenizer.special_tokens_map, self.tokenizer.split_special_tokens]
        parts = (self.tokenizer.backend_tokenizer.to_str(), json.dumps(special, sort_keys=True, default=str))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        try:
            texts = [self.render([{"role": "user", "content": sentinel}]) for sentinel in _SENTINELS]
        except DataError as error:
            raise ModelError(f"the chat template cannot be used: it refuses a single user message\n{error}") from error
        whole = [self.encode_text(text) for text in texts]
        alone = [self.encode_text(sentinel) for sentinel in _SENTINELS]
        prefix = _common_prefix(*whole)
        suffix = _common_prefix(*(ids[::-1] for ids in whole))[::-1]
        if all([*prefix, *middle, *suffix] == ids for middle, ids in zip(alone, whole, strict=True)):
            return prefix, suffix

        # The document's edges merge with the text around them: tokenize that text by itself instead.
        before, _, after = texts[0].partition(_SENTINELS[0])
        prefix, suffix = self.encode_text(before), self.encode_text(after)
        if [self.decode([*prefix, *middle, *suffix]) for middle in alone] != [self.decode(ids) for ids in whole]:
            raise ModelError(
                "the chat template does not write a user message as it stands, so documents cannot be placed in one\n"
                f"expected text, {_SENTINELS[0]!r}, text; found {texts[0]!r}\n"
                "pass another template: --set chat_template=FILE"
            )
        return prefix, suffix

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.template, self.supervision, self.current_date)

    @cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens."""
        return ControlTokens(self.tokenizer)

    @cached_property
    def _characters_per_token(self) -> int | None:
        return characters_per_token(self.tokenizer)

    def _holds_control_tokens(self, value: Any) -> bool:
        """Return whether texts hold control tokens that have to be encoded as text; `DataError` where they are refused."""
        found = None if self.control_tokens == "keep" else self.control.find(value)
        if found is not None and self.control_tokens == "refuse":
            raise DataError(
                f"holds the control token {found!r} of the tokenizer, and control_tokens: refuse accepts none; remove it, "
                "or have it read as text: --set control_tokens=text"
            )
        return found is not None

    def _encoded_contents(self, text: str, **options: Any) -> Any:
        """Return what the tokenizer makes of a document, its control tokens as the run says."""
        if not self._holds_control_tokens(text):
            return self.tokenizer(text, add_special_tokens=False, **options)
        encoding: Any = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, **options)
        self.control.require_text(encoding["input_ids"])
        return encoding

    def _hidden(self, messages: Messages, tools: Sequence[Any] | None) -> Hidden:
        """Return what hides the control tokens of a conversation; empty where there is nothing to hide."""
        if not self._holds_control_tokens([*messages, tools]):
            return {}
        self._renderer.render(messages, tools, False)  # a template may refuse some that it finds, as a likely mistake
        return self.control.choose_hidden(self.template, list(messages), tools)

    def _rendered(
        self, messages: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool, hidden: Hidden
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation with these control tokens of its texts hidden."""
        if hidden:
            messages, tools = (self.control.hide(value, hidden) for value in (messages, tools))
        return self._renderer.render(messages, tools, add_generation_prompt)


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    supervision: Supervision = "content",
    current_date: str | None = None,
    control_tokens: Contents = "text",
) -> ChatFormat:
    """Make the chat format of a run.

    Args:
        template: text of a Jinja chat template; default: `default_template`.
        supervision: `content` (message text and end tokens) or `sampled` (channel headers too); a variable for templates
            that know both conventions.
        current_date: "YYYY-MM-DD", the date that templates print for today; default: `DEFAULT_DATE`.
        control_tokens: what those in messages and documents are: `text`, an error (`refuse`), or control tokens (`keep`).

    Raises:
        ModelError: the tokenizer cannot map text to tokens, or no template is known for it.
        ConfigError: `current_date` is not a day of the calendar.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) is a slow one\n"
            "expected a fast tokenizer (a tokenizer.json), which alone can say which tokens the assistant wrote\n"
            "pass another: --set tokenizer_name_or_path=NAME"
        )
    template = default_template(tokenizer) if template is None else template
    if template is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template and none is shipped for it\n"
            "pass a Jinja file with {% generation %} tags: --set chat_template=FILE"
        )
    try:
        day = date.fromisoformat(current_date or DEFAULT_DATE)
    except ValueError as error:
        raise ConfigError([f"current_date: {current_date!r} is not a day of the calendar ({error})"]) from None
    return ChatFormat(tokenizer, template, supervision, day.isoformat(), control_tokens)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template for a run that names none.

    For harmony's control tokens, the shipped one of GPT-OSS. Else the tokenizer's own if its generation tags work; else
    the first shipped one for the tokenizer's control tokens that renders plain turns as its own does; else its own. For
    a tokenizer without a template, the first shipped one for its control tokens. None where there is none.
    """
    if has_harmony_tokens(tokenizer):
        return resource(TEMPLATE).read_text(encoding="utf-8")
    named = tokenizer.chat_template
    own = named.get("default") if isinstance(named, dict) else named
    if own is None:
        return next((shipped.text for shipped in find_shipped_templates(tokenizer)), None)
    try:
        if ChatFormat(tokenizer, own, "content", DEFAULT_DATE).has_generation_tags:
            return own
    except ModelError:
        return own  # it is refused, with the reason, where it is used
    # `sampled`, as a template without tags leaves channel headers to the model
    theirs = ChatFormat(tokenizer, own, "sampled", DEFAULT_DATE)
    candidates = (shipped.text for shipped in find_shipped_templates(tokenizer))
    return next(
        (text for text in candidates if renders_alike(replace(theirs, template=text).render, theirs.render)), own
    )


def _common_prefix(one: list[int], other: list[int]) -> list[int]:
    """Return the longest common prefix of two lists."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
