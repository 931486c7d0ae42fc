"""Verification of supervision: the supervised tokens of a chat format, decoded and compared with the messages.

The comparison reads no generation tags, so it finds tags in the wrong place, in macros (where spans shift) and in
comments, and tokenizers whose offsets extend a span.
"""

import re
from collections.abc import Sequence
from itertools import groupby

from d2l.data.chat.format import ChatFormat, Encoded, Messages
from d2l.data.chat.harmony import expected_supervision, has_harmony_tokens


def supervised_texts(chat: ChatFormat, encoded: Encoded) -> list[str]:
    """Decode every contiguous span of supervised tokens, control tokens included."""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    spans = groupby(pairs, key=lambda pair: pair[1])
    return [chat.decode([token for token, _ in span]) for is_supervised, span in spans if is_supervised]


def supervision_faults(chat: ChatFormat, messages: Messages) -> tuple[str, ...]:
    """List the differences between the supervised tokens of a conversation and its assistant messages.

    For harmony's control tokens the supervised texts must equal `expected_supervision`. For any other format each
    assistant message must be one span that holds its content and ends with an added token (the stop token), and nothing
    else but added tokens and white space; turns with tools cannot be verified there.

    Returns:
        One line for each difference; empty where there is none.

    Raises:
        DataError, ModelError: as `ChatFormat.encode`.
    """
    found = supervised_texts(chat, chat.encode(messages))
    if has_harmony_tokens(chat.tokenizer):
        texts = expected_supervision(messages, chat.supervision)
        expected = [chat.decode(chat.encode_text(text)) for text in texts]  # a small vocabulary lacks words
        return _differences(found, expected, f"{chat.supervision} supervision of harmony")
    contents = [str(message["content"]) for message in messages if message["role"] == "assistant"]
    added_tokens = sorted(chat.tokenizer.get_added_vocab(), key=len, reverse=True)
    if len(found) != len(contents):
        return (f"{len(found)} supervised spans for {len(contents)} assistant messages: {found!r}",)
    return tuple(
        f"assistant message {number}: {fault}; found {span!r}"
        for number, (span, content) in enumerate(zip(found, contents, strict=True), start=1)
        for fault in _generic_faults(span, content.strip(), added_tokens)
    )


def _differences(found: Sequence[str], expected: Sequence[str], convention: str) -> tuple[str, ...]:
    """List the spans that differ from the expected ones."""
    if len(found) != len(expected):
        return (f"{len(found)} supervised spans, {convention} has {len(expected)}: {list(found)!r}",)
    return tuple(
        f"supervised span {number} is {span!r}, {convention} has {text!r}"
        for number, (span, text) in enumerate(zip(found, expected, strict=True), start=1)
        if span != text
    )


def _generic_faults(span: str, content: str, added_tokens: Sequence[str]) -> list[str]:
    """List what is wrong with the supervised span of one assistant message, by the rules for any format."""
    faults = []
    if content not in span:
        faults.append(f"{content!r} is not supervised as a whole")
    if not span.rstrip().endswith(tuple(added_tokens)):
        faults.append("no stop token is supervised behind it, so the model would not learn to end")
    added = "|".join(map(re.escape, added_tokens)) or r"(?!)"
    if content in span and (rest := re.sub(added, "", span.replace(content, "", 1)).strip()):
        faults.append(f"{rest!r} is supervised too, which is not of this message")
    return faults
