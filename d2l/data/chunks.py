"""A document in chunks: consecutive pieces of its tokens, each between what the chat template puts around a message."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from d2l.data.chat.format import ChatFormat
from d2l.data.division import Division, EqualDivision, PlacedDivision, fill_gaps
from d2l.data.limits import DoesNotFitError, Limits, check_chunk_length, check_document_text, describe_excess
from d2l.data.sentences import find_places
from d2l.errors import ConfigError

Ids = tuple[int, ...]
Piece = tuple[int, int]  # first token of the document in a chunk, and the one after its last


def chunk_document(
    text: str, chat: ChatFormat, limits: Limits, generator: random.Random | None = None
) -> tuple[Ids, ...]:
    """Tokenize a document into chunks; see `split_context`. One that cannot fit is refused before it is tokenized."""
    check_document_text(text, chat.least_tokens, limits)
    prefix, suffix = chat.context_affixes()
    if limits.chunking == "equal":
        return split_context(chat.encode_contents(text), prefix, suffix, limits, generator)
    ids, spans = chat.locate_contents(text)
    return split_context(ids, prefix, suffix, limits, generator, find_places(text, spans))


def split_context(
    text: Sequence[int],
    prefix: Sequence[int],
    suffix: Sequence[int],
    limits: Limits,
    generator: random.Random | None = None,
    places: Sequence[Sequence[int]] = (),
) -> tuple[Ids, ...]:
    """Cut a document into pieces, each between the affixes: of equal length, or at places where it may be cut.

    Args:
        text, prefix, suffix: token ids.
        limits: `max_ctx_chunk_len` and `min_ctx_chunk_len` hold for every chunk with its affixes and overlap.
        generator: source of the draw of a chunk count by `limits.num_chunk_probs`; None: as few chunks as fit.
        places: where pieces may end, in tokens, ascending, the last at the document's length; the best kind of places
            first, others for what these leave too long. Without any, and where they make more chunks than the limits
            allow or fewer than are drawn, pieces are equal.

    Raises:
        DoesNotFitError: the document is empty, or exceeds a limit.
        ConfigError: the affixes alone, or they and the overlap, fill a chunk.
    """
    affixes = len(prefix) + len(suffix)
    whole = len(text) + affixes
    if not text:
        raise DoesNotFitError("empty document", "the tokenizer makes no token of the document")
    if 0 <= limits.max_ctx_len < whole:
        reason = describe_excess(whole, "document", "max_ctx_len", limits.max_ctx_len)
        raise DoesNotFitError("document too long", reason)
    pieces = _Cutting(len(text), affixes, limits, places).pieces(generator)
    lengths = [stop - start + affixes for start, stop in pieces]
    if 0 <= limits.max_packed_ctx_len < sum(lengths):
        what = "document" if len(pieces) == 1 else f"document in {len(pieces)} chunks"
        reason = describe_excess(sum(lengths), what, "max_packed_ctx_len", limits.max_packed_ctx_len)
        raise DoesNotFitError("document too long", reason)
    check_chunk_length(max(lengths), limits)
    return tuple((*prefix, *text[start:stop], *suffix) for start, stop in pieces)


@dataclass(frozen=True)
class _Cutting:
    """Cutting of a document of `length` tokens under limits; `places` as in `split_context`."""

    length: int
    affixes: int
    limits: Limits
    places: Sequence[Sequence[int]]

    def pieces(self, generator: random.Random | None) -> list[Piece]:
        """Return the pieces: of a drawn number where numbers are drawn and the limits allow one, else of the fewest."""
        divisions = self._divisions()
        fewest = divisions[0].fewest
        if generator is None or not self.limits.num_chunk_probs:
            return self._divided(divisions, fewest)
        requested = {count: p for count, p in self.limits.num_chunk_probs.items() if p > 0}
        most = min(self._most(), self._most_not_too_short())
        weights = {
            count: p
            for count, p in requested.items()
            if fewest <= count <= most and self._fits(self._divided(divisions, count))
        }
        if weights:
            return self._divided(divisions, generator.choices(list(weights), list(weights.values()))[0])
        for count in range(min(most, min(requested)), fewest, -1):  # the nearest below what is requested
            if self._fits(pieces := self._divided(divisions, count)):
                return pieces
        return self._divided(divisions, fewest)

    def _divisions(self) -> list[Division]:
        """Return the ways to divide, the best one that makes no more chunks than the limits allow first.

        Raises:
            DoesNotFitError: no way makes as few.
            ConfigError: there is no room in a chunk.
        """
        longest = self._longest()
        equal = EqualDivision(self.length, longest)
        allowed = self.limits.max_ctx_chunk_num
        if allowed is not None and equal.fewest > allowed:
            raise DoesNotFitError(
                "too many chunks",
                f"{self.length:,} tokens of document need {equal.fewest} chunks > max_ctx_chunk_num {allowed}; "
                f"raise max_ctx_chunk_num to at least {equal.fewest}, or max_ctx_chunk_len",
            )
        finer = [*self.places[1:], ()]
        placed = [PlacedDivision(fill_gaps(*pair, longest), longest) for pair in zip(self.places, finer, strict=False)]
        most = self._most()
        return [*(it for it in placed if it.fewest <= most), equal]

    def _divided(self, divisions: Sequence[Division], count: int) -> list[Piece]:
        """Divide into this many pieces, in the first way that can, and let each begin with the overlap."""
        ends = next(it for it in divisions if it.fewest <= count <= it.most).ends(count)
        return [(0, ends[0]), *((self._beginning(start), stop) for start, stop in pairwise(ends))]

    def _beginning(self, end: int) -> int:
        """Return where the chunk after one that ends here begins: with whole sentences or words of the overlap, if any."""
        earliest = max(end - self.limits.chunk_overlap, 0)
        for places in self.places if earliest else ():
            if (first := places[bisect_left(places, earliest)]) < end:
                return first
        return earliest

    def _fits(self, pieces: Sequence[Piece]) -> bool:
        """Tell whether no chunk is too short, and all together are not too long for a row."""
        lengths = [stop - start + self.affixes for start, stop in pieces]
        packed = self.limits.max_packed_ctx_len
        return min(lengths) >= self.limits.min_ctx_chunk_len and (packed < 0 or sum(lengths) <= packed)

    def _longest(self) -> int:
        """Return the most tokens of a chunk that are the document's and not in the chunk before."""
        limit, overlap = self.limits.max_ctx_chunk_len, self.limits.chunk_overlap
        if limit < 0:
            return self.length
        room = limit - self.affixes
        if room < 1:
            problem = f"{limit} leaves no room for text: the chat template puts {self.affixes} tokens around"
            raise ConfigError([f"max_ctx_chunk_len: {problem} every chunk; set it well above {self.affixes}"])
        if overlap >= room:
            problem = f"{overlap} leaves no room for new text: a chunk has {room} tokens of text (max_ctx_chunk_len "
            raise ConfigError([f"chunk_overlap: {problem}{limit}, {self.affixes} around it); set it below {room}"])
        return self.length if self.length <= room else room - overlap

    def _most(self) -> int:
        """Return a bound on the number of chunks: one more would exceed a limit."""
        limits, further = self.limits, self.affixes + self.limits.chunk_overlap  # tokens of a further chunk at most
        most = self.length if limits.max_ctx_chunk_num is None else min(self.length, limits.max_ctx_chunk_num)
        if limits.max_packed_ctx_len >= 0 and further:
            most = min(most, (limits.max_packed_ctx_len - self.length + limits.chunk_overlap) // further)
        return most

    def _most_not_too_short(self) -> int:
        """Return a bound on the number of chunks: of one more, some would be below `min_ctx_chunk_len`."""
        return self.length // max(1, self.limits.min_ctx_chunk_len - self.affixes - self.limits.chunk_overlap)
