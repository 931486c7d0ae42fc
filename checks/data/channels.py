"""Supervised tokens by the channel in which the assistant writes them, as harmony names them: analysis, commentary, final."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from d2l.data.tokenize import Row

CHANNEL, BODY = "<|channel|>", "<|message|>"
SAMPLE = 1000  # rows that stand for all
IGNORE_INDEX = -100


def labels_by_channel(tokenizer: "PreTrainedTokenizerBase", rows: Sequence["Row"]) -> Mapping[str, int]:
    """Count the label tokens of up to `SAMPLE` rows, spread evenly, by the channel that was named last before each.

    Returns:
        channel -> tokens, `none` where a message has no channel; empty where the tokenizer knows no channels.
    """
    vocabulary: Any = tokenizer.get_vocab()
    if CHANNEL not in vocabulary or BODY not in vocabulary:
        return {}
    counts: Counter[str] = Counter()
    for row in rows[:: max(1, -(-len(rows) // SAMPLE))]:
        for query in row.queries:
            counts += _count(tokenizer, query.input_ids, query.labels, vocabulary[CHANNEL], vocabulary[BODY])
    return dict(sorted(counts.items()))


def _count(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], channel: int, body: int) -> Counter[str]:
    """Count one question's labels; a channel's name is what stands between the two control tokens."""
    counts: Counter[str] = Counter()
    name = "none"
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token == channel:
            rest = list(ids[place + 1 :])
            header = rest[: rest.index(body)] if body in rest else rest
            name = tokenizer.decode(header).split()[0] if header else "none"
        counts[name] += label != IGNORE_INDEX
    return +counts
