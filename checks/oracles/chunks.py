"""Where a document is cut into chunks, and what they have to hold: every token of it, in order.

Source of the equal pieces: `split_too_long_ctx` of SakanaAI/doc-to-lora@baa85db (`data/processing.py`). Source of those of
whole sentences and of overlaps: the definitions of `chunking` and `chunk_overlap` in CONFIG.md.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise

Piece = tuple[int, int]  # first token of a piece, and the one after its last


def equal_pieces(length: int, room: int, overlap: int, count: int | None = None) -> list[Piece]:
    """Cut into n pieces of ⌈length / n⌉ new tokens, the last of what is left; each begins with the overlap before it.

    Args:
        room: the most tokens of a piece. A document of no more than these is one piece.
        count: n; by default as few as fit.
    """
    if count is None:
        count = 1 if length <= room else -(-length // (room - overlap))
    step = -(-length // count)
    return [(max(start - overlap, 0), min(start + step, length)) for start in range(0, length, step)]


def sentence_pieces(
    sentences: Sequence[int], words: Sequence[int], room: int, overlap: int, count: int | None = None
) -> list[Piece]:
    """Cut where sentences end, each piece as near as possible to an equal share of what is left; every way is tried.

    An overlap begins with the first sentence that it can hold whole, else with the first word, else with its first token.

    Args:
        sentences, words: how many tokens there are up to the end of each one, ascending. No sentence exceeds a piece.
        room: the most tokens of a piece. A document of no more than these is one piece.
        count: number of pieces; by default as few as fit.
    """
    length = sentences[-1]
    new = room if length <= room else room - overlap
    counts = range(1, len(sentences) + 1) if count is None else [count]
    ways = next(ways for count in counts if (ways := _ways(sentences, count, new)))
    start, number = 0, len(ways[0])
    for place in range(number):
        share = start + (length - start) / (number - place)
        _, start = min((abs(way[place] - share), way[place]) for way in ways)
        ways = [way for way in ways if way[place] == start]
    ends = [0, *ways[0]]
    return [(_beginning(start, overlap, (sentences, words)), stop) for start, stop in pairwise(ends)]


def _ways(places: Sequence[int], count: int, longest: int) -> list[tuple[int, ...]]:
    """Return every way to end so many pieces at places, none of them too long."""
    ways = [(*ends, places[-1]) for ends in combinations(places[:-1], count - 1)]
    return [way for way in ways if all(b - a <= longest for a, b in zip((0, *way), way, strict=False))]


def _beginning(end: int, overlap: int, kinds: Sequence[Sequence[int]]) -> int:
    """Return where a piece begins, of which the one before it ends here."""
    earliest = max(end - overlap, 0)
    for places in kinds if earliest else ():
        for place in places:
            if earliest <= place < end:
                return place
    return earliest


def joined(pieces: Sequence[Sequence[int]], document: Sequence[int], overlap: int) -> list[int]:
    """Join the pieces of a document, each of which may begin with as many as `overlap` of the tokens before it.

    Which of them it repeats is not known, so every reading is tried.

    Returns:
        the document where one reading gives it; else the pieces side by side, repeated tokens included.
    """
    ends = {0}  # where the document may be read up to
    for piece in pieces if overlap else ():
        starts = {start for end in ends for start in range(max(0, end - overlap), end + 1)}
        ends = {start + len(piece) for start in starts if list(document[start : start + len(piece)]) == list(piece)}
    if overlap and len(document) in ends:
        return list(document)
    return [token for piece in pieces for token in piece]
