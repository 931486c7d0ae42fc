"""What a question with its answer, and a document, become in tokens: by the tokenizer library and the template alone.

Source: `apply_chat_template` and `__call__` of transformers' tokenizers. Texts are rendered by the library and encoded
without added tokens. Which tokens are supervised is a rule on the rendered text: with `content` the answer's text and
the token that ends it, with `sampled` all that the model writes after the generation prompt. White space and control
tokens right beside them belong to it where the template's generation tags enclose them.

Control tokens in the texts are text, unless a run keeps them: such a conversation is rendered with other letters in their
places, cut at the control tokens that are there then, which are the template's, and encoded piece by piece.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from checks.oracles.special_tokens import SpecialTokens

QUESTION, ANSWER = "Zebras graze", "Kettles whistle"  # stand in for texts; they occur in no template
HARMONY_HEADER = "<|channel|>final<|message|>"  # what GPT-OSS writes before an answer; `content` leaves it out
# Replaces transformers' clock: the day in each format that the template names, since functions cannot be passed to it.
CLOCK = "{%- macro strftime_now(format) -%}{{- days[format] -}}{%- endmacro +%}"
FORMATS = re.compile(r"""(["'])((?:(?!\1).)*%(?:(?!\1).)*)\1""")  # a text in quotes with a percent sign
REFUSALS = (jinja2.TemplateError, TypeError, ValueError)  # what rendering raises for a conversation that is refused


@dataclass(frozen=True)
class Expected:
    """Token ids of a question with its answer; those from `start` up to `stop`, exclusive, are supervised."""

    ids: list[int]
    start: int
    stop: int


@dataclass(frozen=True)
class _Frame:
    """Texts around a question and its answer, and how many characters beside the answer are supervised with it.

    `opening` is the text before the last control token that precedes a question, and `opening_ids` its tokens: no token
    spans the edge of a control token, so the rest of a conversation is encoded by itself.
    """

    head: str
    opening: str
    opening_ids: list[int]
    middle: str
    tail: str
    lead: int
    trail: int


@dataclass(frozen=True)
class ConversationFormat:
    """A tokenizer, the text of a chat template, `content` or `sampled`, and the day that templates print for today.

    `keeps_control_tokens`: whether those in the texts of messages and documents are control tokens, and not text.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    supervision: str
    day: date
    keeps_control_tokens: bool = False

    def render(self, conversations: Sequence[Sequence[dict[str, str]]], *, prompt: bool = False) -> list[str]:
        """Render conversations as texts; with `prompt`, each ends where the assistant's turn begins.

        Raises:
            one of `REFUSALS`: the template refuses a conversation.
        """
        texts: Any = self.tokenizer.apply_chat_template(
            [list(turns) for turns in conversations],
            chat_template=self._text,
            add_generation_prompt=prompt,
            tokenize=False,
            **self._variables,
        )
        return list(texts)

    def encode(self, text: str) -> list[int]:
        """Encode a text as token ids; control tokens in it are read as such, none is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_contents(self, text: str) -> list[int]:
        """Encode a document as token ids: control tokens in it are text, unless they are kept."""
        splits = not self.keeps_control_tokens
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=splits)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids as text, control tokens included and white space unchanged."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def expected(self, questions: Sequence[tuple[str, str]], *, each: bool = True) -> list[Expected | None]:
        """Return the tokens of each question with its answer; None where the template refuses it.

        Args:
            each: whether every conversation is rendered by the library. Otherwise texts without white space at their
                edges and without a `<` are put into a conversation that was rendered once, which takes a fifth of the time.
        """
        plain = [not each and _is_plain(question) and _is_plain(answer) for question, answer in questions]
        others = [_turns(*pair) for pair, is_plain in zip(questions, plain, strict=True) if not is_plain]
        rendered = iter(self._rendered(others))
        frame = self._frame
        texts = [
            f"{frame.head}{question}{frame.middle}{answer}{frame.tail}" if is_plain else next(rendered)
            for (question, answer), is_plain in zip(questions, plain, strict=True)
        ]
        return [
            None if text is None else self._by_pieces(*pair) if self.has_special(*pair) else self._tokens(text, pair[1])
            for text, pair in zip(texts, questions, strict=True)
        ]

    def has_special(self, *texts: str) -> bool:
        """Tell whether texts hold special tokens that have to be read as text."""
        return not self.keeps_control_tokens and any(map(self.special.pattern.search, texts))

    def document(self, text: str) -> str:
        """Render a document as a user's message of its own.

        Raises:
            one of `REFUSALS`: the template refuses it.
        """
        return self.render([[{"role": "user", "content": text}]])[0]

    @cached_property
    def affixes(self) -> tuple[tuple[list[int], list[int]], ...]:
        """Token ids before and after a document in a user's message: the readings that give the rendered text.

        Mostly there is one. Where the text around a document merges with its edges into one token (a space, a newline),
        the ids around a word in the rendered message and the ids of the text around it by itself may differ.
        """
        rendered = self.document(QUESTION)
        before, _, after = rendered.partition(QUESTION)
        whole, inside = self.encode(rendered), self.encode(QUESTION)
        last = len(whole) - len(inside)
        places = [place for place in range(last + 1) if whole[place : place + len(inside)] == inside]
        found = [(whole[:place], whole[place + len(inside) :]) for place in places[-1:]]
        by_text = (self.encode(before), self.encode(after))
        return (*found, *([by_text] if by_text not in found else []))

    @cached_property
    def _variables(self) -> dict[str, Any]:
        return {
            "supervision": self.supervision,
            "current_date": self.day.isoformat(),
            "days": {name: self.day.strftime(name) for _, name in FORMATS.findall(self.template)},
        }

    @cached_property
    def _text(self) -> str:
        return CLOCK + self.template if "strftime_now" in self.template else self.template

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """A pattern of any control token of the tokenizer, the longest that fits."""
        names = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return SpecialTokens(self.tokenizer)

    @cached_property
    def _frame(self) -> _Frame:
        """The frame of two stand-ins, measured on their rendered text."""
        turns = _turns(QUESTION, ANSWER)
        text = self.render([turns])[0]
        place = text.rindex(ANSWER)
        asked = text.rindex(QUESTION, 0, place)
        head, middle = text[:asked], text[asked + len(QUESTION) : place]
        tail = text[place + len(ANSWER) :]
        tagged_lead, tagged_trail = self._tagged(turns, place, place + len(ANSWER))
        end = self.control_tokens.search(tail)
        trail = end.end() if end else 0
        if tail[:tagged_trail].startswith(tail[:trail]) and self._is_empty(tail[trail:tagged_trail]):
            trail = max(trail, tagged_trail)
        lead = self._header(turns, text, place)
        if self._is_empty(middle[len(middle) - tagged_lead :]) and not middle.endswith(HARMONY_HEADER):
            lead = tagged_lead
        return _Frame(head, *self._opening(head, text), middle, tail, lead, trail)

    def _opening(self, head: str, text: str) -> tuple[str, list[int]]:
        """Return the text before the last control token of `head`, and its tokens; nothing where they depend on the rest."""
        tokens = [match.start() for match in self.control_tokens.finditer(head)]
        opening = head[: tokens[-1]] if tokens else ""
        ids = self.encode(opening) if opening else []
        return (opening, ids) if ids + self.encode(text[len(opening) :]) == self.encode(text) else ("", [])

    def _header(self, turns: list[dict[str, str]], text: str, place: int) -> int:
        """Count the characters before the answer that the model writes and that are supervised."""
        if self.supervision == "content":
            return 0
        if text[:place].endswith(HARMONY_HEADER):
            return len(HARMONY_HEADER)
        prompt = self.render([turns[:1]], prompt=True)[0]
        return place - len(prompt) if text.startswith(prompt) else 0

    def _tagged(self, turns: list[dict[str, str]], start: int, stop: int) -> tuple[int, int]:
        """Count the characters before and after the answer that the template's generation tags enclose with it."""
        rendered: Any = render_jinja_template(
            conversations=[turns],
            chat_template=self._text,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self._variables},
        )
        around = [(first, last) for first, last in rendered[1][0] if first <= start and stop <= last]
        return (start - around[-1][0], around[-1][1] - stop) if around else (0, 0)

    def _is_empty(self, text: str) -> bool:
        """Tell whether a text holds nothing but control tokens and white space."""
        return not self.control_tokens.sub("", text).strip()

    def _rendered(self, conversations: list[list[dict[str, str]]]) -> list[str | None]:
        """Render each conversation; None where the template refuses it."""
        try:
            return [*self.render(conversations)] if conversations else []
        except REFUSALS:
            if len(conversations) == 1:
                return [None]
            return [text for turns in conversations for text in self._rendered([turns])]

    def _tokens(self, text: str, answer: str) -> Expected | None:
        """Encode a rendered conversation, and find the supervised tokens by the place of the answer in the text."""
        frame = self._frame
        skipped = len(frame.opening_ids) if text.startswith(frame.opening) else 0
        text = text[len(frame.opening) :] if skipped else text
        encoding = self.tokenizer(text, add_special_tokens=False)
        found = self._supervised(text, answer, encoding.char_to_token)
        if found is None:
            return None
        first, last = (skipped + place for place in found)
        ids = [*frame.opening_ids[:skipped], *encoding["input_ids"]]
        return Expected(ids, max(first, 1), last + 1)  # nothing predicts the first token

    def _by_pieces(self, question: str, answer: str) -> Expected | None:
        """Encode a conversation whose texts hold special tokens piece by piece, cut at those of the template."""
        stand_ins = self.special.stand_ins(question + answer)
        asked, answered = (self.special.hide(text, stand_ins) for text in (question, answer))
        text = self.render([_turns(asked, answered)])[0]
        ids, token_at = self.special.encode_pieces(text, stand_ins)
        found = self._supervised(text, answered, token_at.__getitem__)
        return None if found is None else Expected(ids, max(found[0], 1), found[1] + 1)

    def _supervised(self, text: str, answer: str, token_at: Callable[[int], int | None]) -> tuple[int, int] | None:
        """Find the first and the last supervised token by the place of the answer; None where it is not there."""
        frame = self._frame
        for written in dict.fromkeys((answer, answer.rstrip(), answer.lstrip(), answer.strip())):
            stop = len(text) - len(frame.tail)
            start = stop - len(written)
            if text.endswith(written + frame.tail) and text[:start].endswith(frame.middle):
                inside = range(start - frame.lead, stop + frame.trail)
                first = next((at for place in inside if (at := token_at(place)) is not None), 0)
                last = next((at for place in reversed(inside) if (at := token_at(place)) is not None), -1)
                return first, last
        return None


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_plain(text: str) -> bool:
    """Tell whether a template that writes messages as they stand has nothing to do about a text."""
    return bool(text) and not text[0].isspace() and not text[-1].isspace() and "<" not in text
