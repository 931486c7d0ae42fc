"""A packed row as people can read it: its chunks and questions token by token, with the supervised ones marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.epochs import epoch_batches
from d2l.data.packing import PackedBatch
from d2l.data.tokenize import IGNORE_INDEX

RECORDS = 32  # of each data set are read: enough to fill a row, or to show how far a row is from full
MOST_TOKENS = 400  # of one chunk or question
MOST_PARTS = 12  # chunks, and questions
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens


@dataclass(frozen=True)
class Token:
    """A token's text, or that of the few that make one character: their ids, position of the first, and supervision."""

    text: str
    ids: tuple[int, ...]
    position: int
    supervised: bool = False


@dataclass(frozen=True)
class Part:
    """A chunk or a question: its first tokens, how many there are, its record, and where it starts in the packed row."""

    tokens: tuple[Token, ...]
    length: int
    record: int
    start: int

    @property
    def n_labels(self) -> int:
        """Number of supervised tokens among those that are here."""
        return sum(len(token.ids) for token in self.tokens if token.supervised)


@dataclass(frozen=True)
class Sample:
    """A packed row: the first of its chunks and questions, how many there are, and the records that they come from."""

    chunks: tuple[Part, ...]
    questions: tuple[Part, ...]
    n_chunks: int
    n_questions: int
    records: tuple[int, ...]


def sample_row(config: RunConfig) -> Sample:
    """Pack the first records of a run's data as the run does, and return the first packed row.

    Raises:
        D2LError: data or tokenizer cannot be read.
    """
    components = Components(config.model_copy(update={"max_train_samples_per_ds": _records(config)}))
    batch = epoch_batches(config, components.rows, epoch=0, among=range(len(components.rows)))[0]
    return read_batch(components.chat, batch)


def read_batch(chat: ChatFormat, batch: PackedBatch, *, whole: bool = False) -> Sample:
    """Return the text of a packed row, by its own borders: the positions that restart.

    Args:
        whole: every token of every part, instead of the first ones.
    """
    labels = (batch.labels[0] != IGNORE_INDEX).tolist()
    context, queries = batch.ctx_ids[0].tolist(), batch.input_ids[0].tolist()
    chunk_records = _repeated(batch.record_ids, batch.n_ctx_chunks)
    query_records = _repeated(batch.record_ids, batch.n_queries)
    chunks = _cut(context, [False] * len(context), batch.ctx_position_ids[0].tolist(), chunk_records)
    questions = _cut(queries, labels, batch.position_ids[0].tolist(), query_records)
    return Sample(
        chunks=tuple(_part(chat, it, whole) for it in (chunks if whole else chunks[:MOST_PARTS])),
        questions=tuple(_part(chat, it, whole) for it in (questions if whole else questions[:MOST_PARTS])),
        n_chunks=len(chunks),
        n_questions=len(questions),
        records=batch.record_ids,
    )


def _records(config: RunConfig) -> int:
    return min(RECORDS, config.max_train_samples_per_ds or RECORDS)


@dataclass(frozen=True)
class _Piece:
    """Token ids between two borders of a packed row, which of them are supervised, their record, and where they start."""

    ids: Sequence[int]
    supervised: Sequence[bool]
    record: int
    start: int


def _repeated(records: Sequence[int], counts: Sequence[int]) -> list[int]:
    return [record for record, count in zip(records, counts, strict=True) for _ in range(count)]


def _cut(
    ids: Sequence[int], supervised: Sequence[bool], positions: Sequence[int], records: Sequence[int]
) -> list[_Piece]:
    """Cut a packed row where positions restart; `records` has the record of each piece."""
    starts = [place for place, position in enumerate(positions) if position == 0]
    borders = pairwise([*starts, len(ids)])
    return [
        _Piece(ids[start:end], supervised[start:end], record, start)
        for (start, end), record in zip(borders, records, strict=True)
    ]


def _part(chat: ChatFormat, piece: _Piece, whole: bool) -> Part:
    """Decode tokens one by one; those that share a character, and their supervision, together."""
    ids, supervised = piece.ids, piece.supervised
    tokens, start = [], 0
    while start < (len(ids) if whole else min(len(ids), MOST_TOKENS)):
        most = min(start + _LONGEST_CHARACTER, len(ids))
        alike = next((end for end in range(start + 1, most) if supervised[end] != supervised[start]), most)
        end = next(
            (end for end in range(start + 1, alike + 1) if _INCOMPLETE not in chat.decode(ids[start:end])), start + 1
        )
        tokens.append(Token(chat.decode(ids[start:end]), tuple(ids[start:end]), start, supervised[start]))
        start = end
    return Part(tuple(tokens), len(ids), piece.record, piece.start)
