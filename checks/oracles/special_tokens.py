"""Special tokens of a tokenizer, and texts that spell them: encoded piece by piece, by the tokenizer library alone.

Source: `split_special_tokens` of transformers' tokenizers, by which special tokens in a text are read as text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Ids by their text."""
        return {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids, that for unknown text apart."""
        return frozenset(self.by_name.values()) - {self.tokenizer.unk_token_id}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern of any of them, the longest that fits."""
        names = sorted(self.by_name, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"(?!)")

    def count(self, text: str) -> int:
        """Count those that a text spells."""
        return len(self.pattern.findall(text))

    def stand_ins(self, text: str) -> dict[str, str]:
        """Return for each a text as long, of one letter that a text does not hold."""
        letters = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        return {name: next(letters) * len(name) for name in self.by_name}

    def hide(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """Replace those that a text spells by what stands in for them."""
        return self.pattern.sub(lambda match: stand_ins[match[0]], text)

    def encode_pieces(self, text: str, stand_ins: Mapping[str, str]) -> tuple[list[int], list[int | None]]:
        """Encode a text piece by piece, cut at its special tokens; those that are hidden are read as text.

        Returns:
            The ids, and for each character the place of its token among them, where it has one.
        """
        ids: list[int] = []
        token_at: list[int | None] = []
        for piece in filter(None, self.pattern.split(text)):
            if piece in self.by_name:
                token_at += [len(ids)] * len(piece)
                ids.append(self.by_name[piece])
                continue
            for name, stand_in in stand_ins.items():
                piece = piece.replace(stand_in, name)
            lead = self._lead if ids else ""
            encoding = self.tokenizer(lead + piece, add_special_tokens=False, split_special_tokens=True)
            before = len(self._encode(lead)) if lead else 0
            places = (encoding.char_to_token(len(lead) + place) for place in range(len(piece)))
            token_at += [None if place is None else len(ids) + place - before for place in places]
            ids += encoding["input_ids"][before:]
        return ids, token_at

    @cached_property
    def _lead(self) -> str:
        """What goes before a piece so that it is not read as the beginning of a text, where a space would be added."""
        both, one = self._encode("\nx"), self._encode("\n")
        return "" if both[len(one) :] == self._encode("x") else "\n"

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
