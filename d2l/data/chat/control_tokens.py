"""Control tokens of a tokenizer in documents and messages: found, and encoded as the text that they are there.

Control tokens are the special tokens of the vocabulary (`<|end|>`, `</s>`, `[INST]`). Tokenizers read them wherever their
letters stand, so a document could end its message and open a system message of its own. Here a conversation is rendered
with those of its messages hidden, so that the ones left are the template's, and those alone become control tokens.

Characters are replaced one by one, so that places in the text stay what they are.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from d2l.errors import DataError

Contents = Literal["text", "refuse", "keep"]  # what a control token in a document or message is
Hidden = Mapping[str, str]  # first character of a control token → the character that stands in for it

_LAST = (
    0x10FFFD  # private-use characters from here down, which no font assigns, begin what stands in for the template's
)
_PRIVATE_USE = (range(0xFFFFD, 0xEFFFF, -1), range(0x100000, 0x10FF00), range(0xE000, 0xF900))


class ControlTokens:
    """Control tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._tokens: dict[int, AddedToken] = {number: token for number, token in added.items() if token.special}
        self._never_text = self._tokens.keys() - {tokenizer.unk_token_id}
        firsts = sorted({token.content[0] for token in self._tokens.values()})
        self._marks = {first: chr(_LAST - place) for place, first in enumerate(firsts)}
        names = sorted((token.content for token in self._tokens.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        is_normalized = any(token.normalized for token in self._tokens.values())
        self._normalizer = self._backend.normalizer if is_normalized else None

    def find(self, value: Any) -> str | None:
        """Return the first control token that a tokenizer would read in a text, or in the texts of lists and mappings."""
        if not isinstance(value, str):
            found = map(self.find, value.values() if isinstance(value, Mapping) else _items(value))
            return next((name for name in found if name), None)
        match = self._pattern.search(value)
        if not match and self._normalizer:
            match = self._pattern.search(self._normalizer.normalize_str(value))
        return match[0] if match else None

    def is_control(self, token: int) -> bool:
        """Return whether an id is that of a control token."""
        return token in self._tokens

    def choose_hidden(self, *values: Any) -> Hidden:
        """Return a character for each one that begins a control token; none of them occurs in the values.

        Raises:
            DataError: the values hold every private-use character, or the stand-in of a control token.
        """
        text = "".join(_texts(values))
        used = set(text)
        if not used.isdisjoint(self._marks.values()) and any(
            self._mark(it.content) in text for it in self._tokens.values()
        ):
            raise DataError(f"a text holds a character near U+{_LAST:X} before the rest of a control token; remove it")
        free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
        hidden = dict(zip(self._marks, free, strict=False))
        if len(hidden) < len(self._marks):
            raise DataError("a text holds every private-use character of Unicode, so that none is left; remove some")
        return hidden

    def hide(self, value: Any, hidden: Hidden) -> Any:
        """Replace the first letter of every control token in a text, or in the texts of lists and mappings."""
        if isinstance(value, Mapping):
            return {key: self.hide(item, hidden) for key, item in value.items()}
        if not isinstance(value, str):
            return [self.hide(item, hidden) for item in value] if _items(value) else value
        while self._pattern.search(value):  # again where hiding one lets another be read that overlaps it
            value = self._pattern.sub(lambda match: hidden[match[0][0]] + match[0][1:], value)
        return value

    def reveal(self, text: str, hidden: Hidden) -> str:
        """Undo `hide`."""
        return text.translate({ord(stand_in): first for first, stand_in in hidden.items()})

    def encode(self, text: str, hidden: Hidden) -> tuple[list[int], Encoding]:
        """Encode a text: hidden control tokens as text, the others as control tokens; no token is added.

        Returns:
            The ids, and an encoding of the same length whose places are those of the text.

        Raises:
            DataError: see `require_text`.
        """
        marked = self.reveal(self._pattern.sub(lambda match: self._mark(match[0]), text), hidden)
        encoding = self._with_stand_ins.encode(marked, add_special_tokens=False)
        self.require_text(encoding.ids)
        return [self._of_stand_in.get(number, number) for number in encoding.ids], encoding

    def require_text(self, ids: list[int]) -> None:
        """Raise `DataError` where the vocabulary gives control tokens even for text that is encoded without them."""
        if found := self._never_text.intersection(ids):
            name = self._tokens[min(found)].content
            raise DataError(f"the tokenizer makes the control token {name!r} of plain text; remove it from the data")

    def _mark(self, name: str) -> str:
        """Return what stands in for a control token of the template."""
        return self._marks[name[0]] + name[1:]

    @cached_property
    def _with_stand_ins(self) -> Tokenizer:
        """A copy that reads no control token, but one that stands in for each: seconds for a large vocabulary."""
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True
        copy.add_tokens([_like(token, self._mark(token.content)) for token in self._tokens.values()])
        return copy

    @cached_property
    def _of_stand_in(self) -> dict[int | None, int]:
        """Return the id of the control token that each stand-in is for."""
        copy = self._with_stand_ins
        return {copy.token_to_id(self._mark(token.content)): number for number, token in self._tokens.items()}


def _like(token: AddedToken, content: str) -> AddedToken:
    """Return a token that is read where another one is, but has another content and is not special."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _items(value: Any) -> Any:
    """Return the items of a list or tuple; none of anything else."""
    return value if isinstance(value, list | tuple) else ()


def _texts(value: Any) -> Any:
    """Yield the texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, Mapping) else _items(value):
            yield from _texts(item)
