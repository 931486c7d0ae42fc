"""How a conversation becomes token ids, and which of them are supervised: a tokenizer, a chat template and a date.

What a template does is measured by rendering with it, never read out of its text: a generation tag inside a comment
or a macro looks right and is not.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import takewhile
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from d2l.data.chat.conversations import PROBE
from d2l.data.chat.harmony import TEMPLATE, Supervision, speaks_harmony
from d2l.data.chat.templates import Messages, shipped_note, writable_templates, writes_as
from d2l.errors import ConfigError, DataError, ModelError
from d2l.io.hub import from_cache_or_hub
from d2l.io.resources import local_or_shipped, resource

# Templates that print a date would give other ids every day. The release day of GPT-OSS: behind the knowledge cutoff
# that its system message states, so a date that the model can have seen, and the one of the published examples.
DEFAULT_DATE = "2025-08-05"

# Goes before every template. The macro shadows transformers' clock with the frozen date, whatever format the template
# asks for. The comment satisfies transformers' search for the tag, whose only effect is a warning: what is supervised
# is measured here.
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

_SENTINELS = ("Quartz reflects light", "Velvet absorbs sound")  # they share neither their start nor their end


@dataclass(frozen=True)
class Encoded:
    """A conversation as `input_ids` [T] and, for each of them, whether it is `supervised` [T]."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with the template, the supervision convention and the date it is used with; see `chat_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    supervision: Supervision
    current_date: str

    def render(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the template is not valid Jinja.
        """
        return self._apply(messages, tools, add_generation_prompt, tokenize=False)

    def encode(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> Encoded:
        """The conversation as token ids with its supervised positions, never truncated and without tokens added.

        A template without working generation tags supervises nothing and is no error here: `has_generation_tags` says
        so, `require_generation_tags` objects.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the template is not valid Jinja.
        """
        encoding = self._apply(
            messages, tools, add_generation_prompt, return_dict=True, return_assistant_tokens_mask=True
        )
        return Encoded(list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]])

    def encode_text(self, text: str) -> list[int]:
        """Text alone as token ids, without a template and without tokens added at its ends."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, control tokens included and nothing tidied."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def context_affixes(self) -> tuple[list[int], list[int]]:
        """The ids before and behind a document that is one user message of its own, system preamble included.

        `prefix + encode_text(document) + suffix` is that message. Where a control token touches the document (both ends
        in GPT-OSS) no token can reach across, so these are exactly the ids of the rendered message. Where plain text
        does (a newline, `User: `) the document's first or last letters might merge with it into another token; the
        text is then still the same and the cut stays at the document's edge, as it must for chunks of a document.

        Raises:
            ModelError: the template does not write a user message as it stands.
        """
        return list(self._affixes[0]), list(self._affixes[1])

    @cached_property
    def has_generation_tags(self) -> bool:
        """Whether the template marks anything of a plain answer, measured by encoding one."""
        try:
            return any(self.encode(PROBE).supervised)
        except DataError as error:
            raise ModelError(
                f"the chat template cannot be used: it refuses a question with its answer\n{error}"
            ) from error

    def require_generation_tags(self) -> None:
        """Object to a template under which no token would ever be learned.

        Raises:
            ModelError: with what to change.
        """
        if not self.has_generation_tags:
            raise ModelError(
                "the chat template marks no assistant token, so the loss would be nan or a quiet 0.0\n"
                "expected {% generation %} and {% endgeneration %} around what the assistant writes, outside macros\n"
                f"pass a template that has them: --set chat_template=FILE{shipped_note(self.tokenizer)}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the template's bytes, the supervision convention and the date, in hexadecimal."""
        return hashlib.sha256("\0".join((self.template, self.supervision, self.current_date)).encode()).hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over all of the tokenizer that shapes ids, and the special tokens that templates see; hexadecimal."""
        self.encode_text("")  # a call clears the padding and truncation that a tokenizer.json may bring
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
        before, _, behind = texts[0].partition(_SENTINELS[0])
        prefix, suffix = self.encode_text(before), self.encode_text(behind)
        if [self.decode([*prefix, *middle, *suffix]) for middle in alone] != [self.decode(ids) for ids in whole]:
            raise ModelError(
                "the chat template does not write a user message as it stands, so documents cannot be placed in one\n"
                f"expected text, {_SENTINELS[0]!r}, text; found {texts[0]!r}\n"
                "pass another template: --set chat_template=FILE"
            )
        return prefix, suffix

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """What the template is told besides the conversation."""
        day = date.fromisoformat(self.current_date)
        clock = {directive: day.strftime(directive) for directive in _DIRECTIVES}
        clock |= {directive: day.strftime(directive.replace("-", "")).lstrip("0") or "0" for directive in _UNPADDED}
        return {"supervision": self.supervision, "current_date": self.current_date, "frozen_clock": clock}

    def _apply(self, messages: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else list(tools),
                chat_template=_PRELUDE + self.template,
                add_generation_prompt=add_generation_prompt,
                **how,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses {str(messages)[:300]}: {error}") from error


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    supervision: Supervision = "content",
    current_date: str | None = None,
) -> ChatFormat:
    """How this tokenizer's conversations are written in this run.

    Args:
        template: the text of a Jinja chat template; default: `default_template`.
        supervision: for templates that know both conventions, `content` (message text and end tokens) or `sampled`
            (channel headers too); it is passed to the template as a variable.
        current_date: "YYYY-MM-DD", what templates are told for today; default: `DEFAULT_DATE`.

    Raises:
        ModelError: the tokenizer cannot map text to tokens, or no template is known for it.
        ConfigError: `current_date` is no day of the calendar.
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
    return ChatFormat(tokenizer, template, supervision, day.isoformat())


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template used where the run names none.

    With harmony's control tokens, the shipped one of GPT-OSS. Else the tokenizer's own where its generation tags work;
    else the first shipped one for the tokenizer's control tokens that writes plain turns just as its own does; else its
    own. Without one of its own, the control tokens alone decide. `None` where there is no template at all.
    """
    if speaks_harmony(tokenizer):
        return resource(TEMPLATE).read_text(encoding="utf-8")
    named = tokenizer.chat_template
    own = named.get("default") if isinstance(named, dict) else named
    if own is None:
        return next((shipped.text for shipped in writable_templates(tokenizer)), None)
    try:
        if ChatFormat(tokenizer, own, "content", DEFAULT_DATE).has_generation_tags:
            return own
    except ModelError:
        return own  # it is refused, with its reason, where it is used
    # `sampled` leaves to the model all that an untagged template leaves to it
    theirs = ChatFormat(tokenizer, own, "sampled", DEFAULT_DATE)
    candidates = (shipped.text for shipped in writable_templates(tokenizer))
    return next((text for text in candidates if writes_as(replace(theirs, template=text).render, theirs.render)), own)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, of a shipped one (`configs/models/tiny_gpt_oss`), or of the hub.

    Raises:
        ModelError: with the reason and what to do about it.
    """
    source = local_or_shipped(name_or_path)
    if source is not None and not source.is_dir():
        found = "a file" if source.is_file() else "nothing"
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path}: expected a folder with tokenizer.json, found {found} there\n"
            "point at the folder: --tokenizer FOLDER"
        )
    try:
        if source is not None:
            return AutoTokenizer.from_pretrained(source)
        return from_cache_or_hub(
            lambda local: AutoTokenizer.from_pretrained(name_or_path, local_files_only=local), name_or_path
        )
    except Exception as error:  # a malformed tokenizer.json is a plain Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path}: {reason}\n"
            "expected a folder with tokenizer.json, or a model on the hub that is reachable or already in the cache\n"
            "offline, download it first (`hf download MODEL`) or point at a folder: --set tokenizer_name_or_path=FOLDER"
        ) from error


def _common_prefix(one: list[int], other: list[int]) -> list[int]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
