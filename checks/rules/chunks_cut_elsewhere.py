"""Documents are cut into chunks where `chunking` and `chunk_overlap` say: at the token.

What it does
------------
Cuts one short document under limits of the check's own: one that it just fits, one that it exceeds by a token, one that
makes several chunks of it, and for a drawn number of chunks. `chunking: equal` is tried with a text of the run, and
`chunking: sentences` with sentences whose ends are known.

Why it matters
--------------
A hypernetwork that was trained on chunks of one kind reads others less well, and a checkpoint of the reference expects
the reference's: 101 tokens under a limit of 25 are 21, 21, 21, 21 and 17 there, not 21, 20, 20, 20, 20 and not 25, 25, 25,
25, 1. A sentence or a fact that is cut in two is in neither chunk. All of these hold the whole document, in order, within
the limits, so that no other check sees them.

How it is detected
------------------
Each chunk must have exactly the tokens that the rule gives, as an oracle computes it by trying every way to cut. The
document's tokens are those of the single chunk that the implementation itself makes of it. Where sentences end is read
from decoded text. Sentences that are longer than a chunk are not tried.

How to fix
----------
Cut n chunks of ⌈length / n⌉ new tokens each, the last of what is left, n as few as fit or as drawn; or where sentences end,
each as near as possible to an equal share of what is left; let every further chunk begin with the overlap.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from checks.data.documents import without_affixes
from checks.data.expected import conversation_format
from checks.data.sizes import unlimited
from checks.faults import Override, override
from checks.implementation import Implementation
from checks.oracles.chunks import Piece, equal_pieces, sentence_pieces
from checks.oracles.conversations import ConversationFormat
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject

LETTERS, TOKENS = 400, 100  # at most so many letters of a text of the run, repeated to at least so many tokens
COUNTS, DRAWN = (5, 4, 6, 7, 8, 9), 3  # chunks
SENTENCES = (
    "The ferry leaves at nine.",
    "Who waits?",
    "Dr. Brenn pays 3.50 for it, e.g. in coins!",
    "It rains.",
    "An old lamp stands near the door of the small house by the sea.",
    "J. Ilse is the name of the harbour master.",
    "Yes.",
    "The bridge is closed until the next summer, they say.",
    "Nobody reads.",
    "The last bus to the town is green.",
)

Cut = Callable[[int, int, int | None], list[Piece]]  # room, overlap, number of chunks


@dataclass(frozen=True)
class _Document:
    """A text, its tokens as a single chunk holds them, and the template's tokens around every chunk."""

    text: str
    ids: list[int]
    affixes: tuple[list[int], list[int]]


def check(subject: "Subject") -> Result:
    """Compare every chunk with the tokens that the rule gives."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    form, chunking = conversation_format(subject), subject.config.chunking
    document = _document(subject, form, " ".join(SENTENCES) if chunking == "sentences" else _text(subject, form))
    if document is None:
        return Skip(f"a text of {TOKENS} tokens and more is not one chunk: its own tokens between the template's")
    rule = _rule(form, document, chunking)
    if rule is None:
        return Skip("the tokenizer does not tell where sentences of plain English end")
    cut, new = rule
    length = len(document.ids)
    overlap = min(subject.config.chunk_overlap, new // 2)
    evidence: dict[str, Any] = {"chunking": chunking, "overlap": overlap, "tokens": length, "chunks": {}}
    unequal = max((DRAWN, *COUNTS), key=lambda n: _spread(_lengths(cut(length, overlap, n))))
    shortest = min(_lengths(cut(length, overlap, unequal)))
    for name, room, drawn, least in _cases(length, new + overlap, unequal, shortest + 1):
        pieces = cut(room, overlap, drawn)
        for count in range(unequal - 1, 0, -1):  # the nearest number below that makes none too short
            if min(_lengths(pieces)) >= least:
                break
            pieces = cut(room, overlap, count)
        expected = [document.ids[start:stop] for start, stop in pieces]
        found = _chunks(subject, document, room, overlap, drawn, least)
        evidence["chunks"][name] = [len(chunk) for chunk in found]
        if found != expected:
            return Fail(
                message=f"documents are cut elsewhere than chunking: {chunking} says",
                expected=f"{name}: {_described(form, expected, found)}",
                actual=_described(form, found, expected),
                remedy="cut as CONFIG.md says of chunking and chunk_overlap: see `d2l config chunking`",
                evidence=evidence,
            )
    number = len(evidence["chunks"])
    return Pass(f"a document of {length:,} tokens is cut where the rule says, under {number} limits", evidence)


def _rule(form: ConversationFormat, document: _Document, chunking: str) -> tuple[Cut, int] | None:
    """Return the oracle for a document, and the most new tokens of a chunk for the case of several chunks.

    None where the tokenizer does not tell where sentences end.
    """
    length = len(document.ids)
    # chunks of ⌈length / n⌉ tokens and those that differ by one at most are not the same if two tokens are left over
    count = next((n for n in COUNTS if -length % n > 1), COUNTS[0])
    new = -(-length // (count - 1)) - 1
    if chunking == "equal":
        return partial(equal_pieces, length), new
    sentences, words = (_ends(form, document.ids, parts) for parts in (SENTENCES, " ".join(SENTENCES).split()))
    if len(sentences) < len(SENTENCES):
        return None
    longest = max(stop - start for start, stop in zip([0, *sentences], sentences, strict=False))
    return partial(sentence_pieces, sentences, words), max(new, longest)


def _spread(lengths: Sequence[int]) -> int:
    return max(lengths) - min(lengths)


def _lengths(pieces: Sequence[Piece]) -> list[int]:
    return [stop - start for start, stop in pieces]


def _cases(length: int, room: int, unequal: int, least: int) -> Iterator[tuple[str, int, int | None, int]]:
    """Yield what is tried: its name, the most tokens of a chunk without the template's, the number drawn, and the fewest.

    Args:
        unequal: a number of chunks of unequal lengths, the shortest below `least` and the longest not.
    """
    yield f"{length:,} tokens that just fit", length, None, 0
    yield f"{length:,} tokens, one too many for a chunk", length - 1, None, 0
    yield f"{length:,} tokens, at most {room} in a chunk", room, None, 0
    yield f"{length:,} tokens in {DRAWN} chunks, as drawn", length, DRAWN, 0
    yield f"{length:,} tokens, {unequal} chunks drawn, one of them shorter than {least}", length, unequal, least


def _text(subject: "Subject", form: ConversationFormat) -> str:
    """Return a text of the run, long enough to be cut."""
    assert subject.records is not None
    text = subject.records[next(iter(subject.rows.rows)).record].context.strip()[:LETTERS]
    return " ".join([text] * math.ceil(TOKENS / max(len(form.encode_contents(text)), 1)))


def _rows(subject: "Subject", text: str, **limits: Any) -> Sequence[Any]:
    """Return the chunks of a text under limits."""
    assert subject.records is not None
    record = subject.records[next(iter(subject.rows.rows)).record]
    record = replace(record, context=text, logprobs_vals=None, logprobs_indices=None)
    config = unlimited(subject.config, chunking=subject.config.chunking, **limits)
    return [chunk for row in subject.implementation.rows(config, subject.chat, (record,)).rows for chunk in row.chunks]


def _document(subject: "Subject", form: ConversationFormat, text: str) -> _Document | None:
    """Read a text as a single chunk; None where it is none, or its tokens are not to be told from the template's."""
    try:
        chunks = _rows(subject, text)
    except D2LError:
        return None
    ids = form.encode_contents(text)
    for prefix, suffix in form.affixes:
        if len(chunks) == 1 and without_affixes(list(chunks[0]), prefix, suffix) == ids:
            return _Document(text, ids, (prefix, suffix))
    return None


def _chunks(
    subject: "Subject", document: _Document, room: int, overlap: int, count: int | None, least: int
) -> list[list[int]]:
    """Return the chunks of a document without the template's tokens."""
    further = sum(map(len, document.affixes))
    limits: dict[str, Any] = {"max_ctx_chunk_len": room + further, "chunk_overlap": overlap}
    limits["num_chunk_probs"] = None if count is None else {count: 1.0}
    limits["min_ctx_chunk_len"] = least + further if least else -1
    chunks = _rows(subject, document.text, **limits)
    return [without_affixes(list(chunk), *document.affixes) or [] for chunk in chunks]


def _ends(form: ConversationFormat, ids: list[int], parts: Sequence[str]) -> list[int]:
    """Return how many tokens there are up to the end of each part and the space after it, where one ends there."""
    places = {" ".join(form.decode(ids[:number]).split()): number for number in range(1, len(ids) + 1)}
    texts = accumulate(parts, "{} {}".format)
    return [places[text] for text in texts if text in places]


def _described(form: ConversationFormat, chunks: list[list[int]], others: list[list[int]]) -> str:
    """Describe chunks: their lengths, and the end of the first one that the others have not."""
    differing: list[int] = next((chunk for chunk in chunks if chunk not in others), [])
    lengths = " ".join(str(len(chunk)) for chunk in chunks)
    return f"chunks of {lengths} tokens, the first that differs ending in {form.decode(differing[-6:])!r}"


def _recut(cut: Callable[[int, int, int], list[int]]) -> Override:
    """Make a fault that gives chunks other lengths; it gets the document's tokens, the number of chunks and their limit."""

    def rows(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
        tokenized = healthy.rows(config, chat, records)
        if config.chunking != "equal" or config.chunk_overlap:
            return tokenized
        before, after = map(tuple, chat.context_affixes())
        first, last = len(before), len(after)

        def recut(chunks: tuple[Any, ...]) -> tuple[Any, ...]:
            ids = [token for chunk in chunks for token in chunk[first : len(chunk) - last]]
            limit = max(len(chunk) for chunk in chunks) if config.num_chunk_probs else config.max_ctx_chunk_len
            ends = [*accumulate(cut(len(ids), len(chunks), limit - first - last))]
            return tuple((*before, *ids[a:b], *after) for a, b in zip([0, *ends], ends, strict=False))

        changed_rows = tuple(
            replace(row, chunks=recut(row.chunks)) if len(row.chunks) > 1 else row for row in tokenized.rows
        )
        return replace(tokenized, rows=changed_rows)

    return override(rows=rows).under(chunking="equal", chunk_overlap=0)


def _evenly(length: int, count: int, limit: int) -> list[int]:
    return [length // count + (number < length % count) for number in range(count)]


def _filled(length: int, count: int, limit: int) -> list[int]:
    return [min(limit, length - start) for start in range(0, length, limit)]


def _without(**values: Any) -> Callable[..., Any]:
    """Make rows as if the configuration had other values."""
    return lambda healthy, config, chat, records: healthy.rows(changed(config, **values), chat, records)


RULE = Rule(
    code="DAT309",
    name="chunks-cut-elsewhere",
    stage="data",
    severity="error",
    sources=(
        "failure mode C18",
        "https://github.com/SakanaAI/doc-to-lora/blob/baa85db4d5df9b29d618af432d6ebf28b3ad5a29/src/ctx_to_lora/data/processing.py",
    ),
    requires=("DAT304", "DAT305", "DAT306"),
    check=check,
    faults=(
        Fault("divided-evenly", "lengths of chunks differ by a token at most: 21 20 20 20 20", _recut(_evenly)),
        Fault("filled-one-by-one", "each chunk has as many tokens as fit: 25 25 25 25 1", _recut(_filled)),
        Fault("short-chunks-made", "min_ctx_chunk_len is not heeded", override(rows=_without(min_ctx_chunk_len=-1))),
        Fault(
            "overlap-lost",
            "chunks begin with no token of the one before",
            override(rows=_without(chunk_overlap=0)).under(chunking="equal", chunk_overlap=1),
        ),
        Fault(
            "cut-in-mid-sentence",
            "chunks are equal where they should end with a sentence",
            override(rows=_without(chunking="equal")).under(chunking="sentences"),
        ),
    ),
)
