"""What chunks of a document have to hold: every token of it, in order, and again no more than the overlap.

Source: the definition of `chunk_overlap` in CONFIG.md.
"""

from collections.abc import Sequence


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
