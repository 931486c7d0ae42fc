"""Teacher logprobs of the last stage: the base's own for real text, and certainty for facts, whose answers are known."""

from collections.abc import Sequence
from dataclasses import replace

from d2l.data.chat.format import ChatFormat
from d2l.data.limits import Limits
from d2l.data.records import Record
from d2l.data.tokenize import tokenize_record

TOP_K = 8
IMPOSSIBLE = -100.0  # natural log of the probability of what a teacher that is certain does not say


def certain(records: Sequence[Record], chat: ChatFormat) -> list[Record]:
    """Return the records with the teacher that puts everything on the answer: its KL loss is the cross-entropy.

    A run has one loss for all of its data, and as many tokens of the teacher everywhere.
    """
    return [_certain(index, record, chat) for index, record in enumerate(records)]


def _certain(index: int, record: Record, chat: ChatFormat) -> Record:
    part = tokenize_record(index, record, chat, Limits(), None)
    labels = [[it for it in query.labels if it >= 0] for row in part.rows for query in row.queries]
    values = (0.0, *[IMPOSSIBLE] * (TOP_K - 1))
    return replace(
        record,
        logprobs_vals=tuple(tuple(values for _ in query) for query in labels),
        logprobs_indices=tuple(tuple((it, *_others(it)) for it in query) for query in labels),
    )


def _others(label: int) -> list[int]:
    """Return the smallest token ids that are not the label."""
    return [it for it in range(TOP_K) if it != label][: TOP_K - 1]
