"""A document in chunks: consecutive pieces of its tokens, each between what the chat template puts around a message."""

import math
import random
from collections.abc import Sequence
from itertools import islice

from d2l.data.chat.format import ChatFormat
from d2l.data.limits import DoesNotFitError, Limits, check_chunk_length, check_document_text, describe_excess
from d2l.errors import ConfigError

Ids = tuple[int, ...]


def chunk_document(
    text: str, chat: ChatFormat, limits: Limits, generator: random.Random | None = None
) -> tuple[Ids, ...]:
    """Tokenize a document into chunks; see `split_context`. One that cannot fit is refused before it is tokenized."""
    check_document_text(text, chat.least_tokens, limits)
    prefix, suffix = chat.context_affixes()
    return split_context(chat.encode_contents(text), prefix, suffix, limits, generator)


def split_context(
    text: Sequence[int],
    prefix: Sequence[int],
    suffix: Sequence[int],
    limits: Limits,
    generator: random.Random | None = None,
) -> tuple[Ids, ...]:
    """Cut a document into pieces of about equal length, each between the affixes.

    Args:
        text, prefix, suffix: token ids.
        limits: `max_ctx_chunk_len` and `min_ctx_chunk_len` hold for every chunk with its affixes.
        generator: source of the draw of a chunk count by `limits.num_chunk_probs`; None: as few chunks as fit.

    Raises:
        DoesNotFitError: the document is empty, or exceeds a limit.
        ConfigError: the affixes alone fill a chunk.
    """
    affixes = len(prefix) + len(suffix)
    whole = len(text) + affixes
    if not text:
        raise DoesNotFitError("empty document", "the tokenizer makes no token of the document")
    if 0 <= limits.max_ctx_len < whole:
        reason = describe_excess(whole, "document", "max_ctx_len", limits.max_ctx_len)
        raise DoesNotFitError("document too long", reason)
    count = _chunk_count(len(text), affixes, limits, generator)
    total = len(text) + count * affixes
    if 0 <= limits.max_packed_ctx_len < total:
        what = "document" if count == 1 else f"document in {count} chunks"
        reason = describe_excess(total, what, "max_packed_ctx_len", limits.max_packed_ctx_len)
        raise DoesNotFitError("document too long", reason)
    short, longer = divmod(len(text), count)
    check_chunk_length(affixes + short + (longer > 0), limits)
    pieces, texts = iter(text), [short + (i < longer) for i in range(count)]
    return tuple((*prefix, *islice(pieces, length), *suffix) for length in texts)


def _chunk_count(length: int, affixes: int, limits: Limits, generator: random.Random | None) -> int:
    """Return the number of chunks: drawn from the requested counts that the limits allow, else the nearest allowed one."""
    fewest = 1
    if limits.max_ctx_chunk_len >= 0:
        room = limits.max_ctx_chunk_len - affixes
        if room < 1:
            problem = (
                f"{limits.max_ctx_chunk_len} leaves no room for text: the chat template puts {affixes} tokens around"
            )
            raise ConfigError([f"max_ctx_chunk_len: {problem} every chunk; set it well above {affixes}"])
        fewest = math.ceil(length / room)
    allowed = length if limits.max_ctx_chunk_num is None else limits.max_ctx_chunk_num
    if fewest > allowed:
        raise DoesNotFitError(
            "too many chunks",
            f"{length:,} tokens of document need {fewest} chunks > max_ctx_chunk_num {allowed}; "
            f"raise max_ctx_chunk_num to at least {fewest}, or max_ctx_chunk_len",
        )
    if generator is None or not limits.num_chunk_probs:
        return fewest
    most = min(allowed, length // max(1, limits.min_ctx_chunk_len - affixes))
    if limits.max_packed_ctx_len >= 0 and affixes:
        most = min(most, (limits.max_packed_ctx_len - length) // affixes)  # a draw never makes a document too long
    weights = {count: p for count, p in limits.num_chunk_probs.items() if fewest <= count <= most and p > 0}
    if weights:
        return generator.choices(list(weights), list(weights.values()))[0]
    return max(fewest, most) if min(limits.num_chunk_probs) > most else fewest
