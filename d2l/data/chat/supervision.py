"""What a chat format supervises, read back from the token ids and compared with what the messages say.

The comparison uses no generation tag: it finds tags in the wrong place, in macros (where spans shift), in comments,
and tokenizers whose offsets make a span run on.
"""

import re
from collections.abc import Sequence
from itertools import groupby

from d2l.data.chat.format import ChatFormat, Encoded, Messages
from d2l.data.chat.harmony import expected_supervision, speaks_harmony


def supervised_texts(chat: ChatFormat, encoded: Encoded) -> list[str]:
    """The text of every unbroken run of supervised tokens, control tokens included."""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [chat.decode([token for token, _ in run]) for is_supervised, run in runs if is_supervised]


def supervision_faults(chat: ChatFormat, messages: Messages) -> tuple[str, ...]:
    """Every way in which the supervised tokens of a conversation are not what its assistant wrote; empty when right.

    With harmony's control tokens the supervised texts must equal `expected_supervision`. For any other format each
    assistant message must be one run that holds its content and ends with an added token (the stop token), and nothing
    else but added tokens and white space; turns with tools are outside what can be judged there.

    Raises:
        DataError, ModelError: as `ChatFormat.encode`.
    """
    found = supervised_texts(chat, chat.encode(messages))
    if speaks_harmony(chat.tokenizer):
        texts = expected_supervision(messages, chat.supervision)
        expected = [chat.decode(chat.encode_text(text)) for text in texts]  # a small vocabulary lacks words
        return _differences(found, expected, f"{chat.supervision} supervision of harmony")
    contents = [str(message["content"]) for message in messages if message["role"] == "assistant"]
    added_tokens = sorted(chat.tokenizer.get_added_vocab(), key=len, reverse=True)
    if len(found) != len(contents):
        return (f"{len(found)} supervised runs for {len(contents)} assistant messages: {found!r}",)
    return tuple(
        f"assistant message {number}: {fault}; found {run!r}"
        for number, (run, content) in enumerate(zip(found, contents, strict=True), start=1)
        for fault in _generic_faults(run, content.strip(), added_tokens)
    )


def _differences(found: Sequence[str], expected: Sequence[str], convention: str) -> tuple[str, ...]:
    if len(found) != len(expected):
        return (f"{len(found)} supervised runs, {convention} has {len(expected)}: {list(found)!r}",)
    return tuple(
        f"supervised run {number} is {run!r}, {convention} has {text!r}"
        for number, (run, text) in enumerate(zip(found, expected, strict=True), start=1)
        if run != text
    )


def _generic_faults(run: str, content: str, added_tokens: Sequence[str]) -> list[str]:
    faults = []
    if content not in run:
        faults.append(f"{content!r} is not supervised as a whole")
    if not run.rstrip().endswith(tuple(added_tokens)):
        faults.append("no stop token is supervised behind it, so the model would not learn to end")
    added = "|".join(map(re.escape, added_tokens)) or r"(?!)"
    if content in run and (rest := re.sub(added, "", run.replace(content, "", 1)).strip()):
        faults.append(f"{rest!r} is supervised too, which is not of this message")
    return faults
