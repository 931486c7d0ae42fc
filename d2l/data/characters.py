"""How many characters a token can stand for at most: what a text costs at least, without tokenizing it.

Tokenizing takes seconds and hundreds of bytes of memory per character, so a document that cannot fit is refused before.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})  # pre-tokenizers that lose no character
_SPLITTING = frozenset({"Punctuation", "Split"})  # that lose none unless their behavior is to remove what they find
# Characters before normalization for one after it. A character is composed of at most four: NFD expands no more.
_NORMALIZING = {"Lowercase": 1, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1, "NFC": 4, "NFKC": 4}
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def characters_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return an upper bound on the characters that one token stands for; None where none can be stated.

    It holds where every character comes through to a token of the vocabulary, as in byte-level BPE and BPE that falls
    back to bytes, the kinds of nearly all published models. It does not where white space is dropped, where unknown
    words become one token, or where a token swallows the white space beside it.
    """
    backend = tokenizer.backend_tokenizer
    vocabulary: dict[str, int] = backend.get_vocab()
    normalizer, splitter = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    factor = 1
    for part in normalizer:
        most = _most_normalized(part)
        if most is None:
            return None
        factor *= most
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if swallows or not all(_keeps_everything(part) for part in splitter):
        return None
    is_byte_level = any(part["type"] == "ByteLevel" for part in (*normalizer, *splitter))
    return factor * max(map(len, vocabulary)) if _knows_everything(backend.model, vocabulary, is_byte_level) else None


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, those of a sequence one by one; none of None."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    return list(settings.get("normalizers") or settings.get("pretokenizers") or [settings])


def _most_normalized(part: Mapping[str, Any]) -> int | None:
    """Return how many characters a normalizer makes one of at most; None where it may drop any number."""
    if part["type"] == "Replace" and part["content"] and "String" in part["pattern"]:
        return max(len(part["pattern"]["String"]), 1)
    return _NORMALIZING.get(part["type"])


def _keeps_everything(part: Mapping[str, Any]) -> bool:
    return part["type"] in _KEEPING or (part["type"] in _SPLITTING and part["behavior"] != "Removed")


def _knows_everything(model: Any, vocabulary: Mapping[str, int], is_byte_level: bool) -> bool:
    """Return whether every character is in a token that is not made of several unknown ones."""
    if not isinstance(model, models.BPE):
        return False
    if is_byte_level:
        return vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    return (model.byte_fallback and vocabulary.keys() >= _BYTE_TOKENS) or (
        model.unk_token is not None and not model.fuse_unk
    )
