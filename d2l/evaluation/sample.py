"""A packed row as people can read it: its chunks and questions token by token, with the supervised ones marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.epochs import epoch_batches
from d2l.data.packing import PackedBatch
from d2l.data.tokenize import IGNORE_INDEX

T = TypeVar("T")
RECORDS = 32  # of each data set are read: enough to fill a row, or to show how far a row is from full
MOST_TOKENS = 400  # of one chunk or question
MOST_PARTS = 12  # chunks, and questions
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens


@dataclass(frozen=True)
class Token:
    """A token's text, or that of the few that make one character, and whether it is supervised."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Part:
    """A chunk or a question: its first tokens, and how many there are."""

    tokens: tuple[Token, ...]
    length: int


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


def read_batch(chat: ChatFormat, batch: PackedBatch) -> Sample:
    """Return the text of a packed row, by its own borders: the positions that restart."""
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    documents = _cut(batch.ctx_ids[0].tolist(), batch.ctx_position_ids[0].tolist())
    questions = _cut(list(zip(ids, labels, strict=True)), batch.position_ids[0].tolist())
    return Sample(
        chunks=tuple(_part(chat, it, [False] * len(it)) for it in documents[:MOST_PARTS]),
        questions=tuple(
            _part(chat, [token for token, _ in it], [label != IGNORE_INDEX for _, label in it])
            for it in questions[:MOST_PARTS]
        ),
        n_chunks=len(documents),
        n_questions=len(questions),
        records=batch.record_ids,
    )


def _records(config: RunConfig) -> int:
    return min(RECORDS, config.max_train_samples_per_ds or RECORDS)


def _cut(values: Sequence[T], positions: Sequence[int]) -> list[Sequence[T]]:
    """Cut a packed row where positions restart."""
    starts = [place for place, position in enumerate(positions) if position == 0]
    return [values[start:end] for start, end in pairwise([*starts, len(values)])]


def _part(chat: ChatFormat, ids: Sequence[int], supervised: Sequence[bool]) -> Part:
    """Decode tokens one by one; those that share a character together."""
    tokens, start = [], 0
    while start < min(len(ids), MOST_TOKENS):
        ends = range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1)
        end = next((end for end in ends if _INCOMPLETE not in chat.decode(ids[start:end])), start + 1)
        tokens.append(Token(chat.decode(ids[start:end]), any(supervised[start:end])))
        start = end
    return Part(tuple(tokens), len(ids))
