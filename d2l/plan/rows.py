"""Packed rows by their lengths alone: those of the run's data, or assumed ones that fill the budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Protocol

from d2l.config.schema import RunConfig
from d2l.data.packing import pack
from d2l.data.tokenize import IGNORE_INDEX, Row

PARAGRAPH = 256  # tokens of a document where no data is at hand: a SQuAD paragraph with the template's tokens around it
QUESTION = 96  # tokens of a question with its answer there
LABELS = 0.1  # at most that share of a question's tokens carries labels there: a short answer and its end token
SAMPLE = 2000  # records that stand for all of the data
UNLIMITED = -1


@dataclass(frozen=True)
class RowShape:
    """Lengths of one packed row, in tokens.

    Attributes:
        documents: chunks of documents in it, each of which the Perceiver reads by itself.
        contexts: documents in it, each of which gets a LoRA of its chunks.
        longest_document, longest_question: bound what a token attends to.
        label_tokens: those with logits.
    """

    context_tokens: int
    documents: int
    contexts: int
    longest_document: int
    question_tokens: int
    longest_question: int
    label_tokens: int

    @property
    def chunks_per_context(self) -> int:
        """Chunks of the document with the most, if they are dealt out evenly."""
        return ceil(self.documents / self.contexts)

    @property
    def chunk_lengths(self) -> tuple[int, ...]:
        """Lengths of the chunks, if all but the longest share its rest evenly."""
        rest, others = self.context_tokens - self.longest_document, self.documents - 1
        return (self.longest_document, *(rest * (i + 1) // others - rest * i // others for i in range(others)))

    @property
    def padded_tokens(self) -> int:
        """Tokens of the documents after padding to the longest one."""
        return self.documents * self.longest_document


class Rows(Protocol):
    """The rows that a configuration would make."""

    @property
    def source(self) -> str:
        """What the rows are, for people."""

    @property
    def most_tokens(self) -> int:
        """The largest budget that changes the rows."""

    def shapes(self, config: RunConfig) -> Sequence[RowShape]:
        """Return the rows of an epoch, or what stands for them."""


@dataclass(frozen=True)
class AssumedRows:
    """Full rows where no data is at hand.

    Args:
        document_tokens: of every document; default: one as long as the row, and rows of paragraphs, which cost more in
            attention and in the Perceiver, respectively.
    """

    document_tokens: int | None = None

    @property
    def source(self) -> str:
        """What the rows are, for people."""
        if self.document_tokens is not None:
            return f"full rows of documents of {self.document_tokens:,} tokens"
        return f"full rows: one document as long as the row, or documents of {PARAGRAPH} tokens, whichever takes more"

    @property
    def most_tokens(self) -> int:
        """The largest budget that is tried."""
        return 2**20

    def shapes(self, config: RunConfig) -> list[RowShape]:
        """Return one row for each length of documents."""
        budget = config.max_packed_ctx_len
        longest = budget if config.max_ctx_len == UNLIMITED else min(budget, config.max_ctx_len)
        lengths = {self.document_tokens} if self.document_tokens else {longest, PARAGRAPH}
        return [self._row(config, min(length, longest)) for length in sorted(lengths)]

    def _row(self, config: RunConfig, document: int) -> RowShape:
        contexts = max(1, config.max_packed_ctx_len // document)
        chunks = _n_chunks(document, config.max_ctx_chunk_len)
        equal = config.chunking == "equal" or chunks == 1  # chunks of whole sentences may be as long as they can be
        question_tokens = config.max_packed_inp_len
        limit = question_tokens if config.max_qas_len == UNLIMITED else config.max_qas_len
        return RowShape(
            context_tokens=contexts * document,
            documents=contexts * chunks,
            contexts=contexts,
            longest_document=ceil(document / chunks) if equal else config.max_ctx_chunk_len,
            question_tokens=question_tokens,
            longest_question=min(question_tokens, limit, QUESTION),
            label_tokens=ceil(LABELS * question_tokens),
        )


@dataclass(frozen=True)
class Record:
    """Lengths of one record's tokens, and its chunks as they were made."""

    document: int
    chunks: int
    longest_chunk: int
    questions: int
    longest_question: int
    labels: int


@dataclass(frozen=True)
class DataRows:
    """The rows that the run's packing makes of its records."""

    records: tuple[Record, ...]
    source: str

    @classmethod
    def of(cls, rows: Sequence[Row], source: str) -> "DataRows":
        """Take the lengths of token rows; of many, those of a sample spread evenly."""
        step = max(1, len(rows) // SAMPLE)
        return cls(tuple(map(_record, rows[::step])), source)

    @property
    def most_tokens(self) -> int:
        """Tokens of all records, which then share one row."""
        return max(sum(record.document for record in self.records), sum(record.questions for record in self.records))

    def shapes(self, config: RunConfig) -> list[RowShape]:
        """Pack the records as the first epoch does; those that fit no row are left out."""
        sizes = [(it.questions, it.document) for it in self.records]
        packed = pack(sizes, config.max_packed_inp_len, config.max_packed_ctx_len, config.seed)
        return [self._row([self.records[place] for place in group], config) for group in packed.groups]

    def _row(self, records: Sequence[Record], config: RunConfig) -> RowShape:
        chunks = [_chunks(record, config.max_ctx_chunk_len) for record in records]
        return RowShape(
            context_tokens=sum(record.document for record in records),
            documents=sum(count for count, _ in chunks),
            contexts=len(records),
            longest_document=max(longest for _, longest in chunks),
            question_tokens=sum(record.questions for record in records),
            longest_question=max(record.longest_question for record in records),
            label_tokens=sum(record.labels for record in records),
        )


def _n_chunks(document: int, longest: int) -> int:
    return 1 if longest == UNLIMITED else ceil(document / longest)


def _chunks(record: Record, longest: int) -> tuple[int, int]:
    """Return the number of a record's chunks and the longest of them: as made or, where these exceed the limit, equal."""
    if longest == UNLIMITED or record.longest_chunk <= longest:
        return record.chunks, record.longest_chunk
    count = _n_chunks(record.document, longest)
    return count, ceil(record.document / count)


def _record(row: Row) -> Record:
    questions, document = row.size
    labels = chain.from_iterable(query.labels for query in row.queries)
    return Record(
        document=document,
        chunks=len(row.chunks),
        longest_chunk=max(map(len, row.chunks)),
        questions=questions,
        longest_question=max(len(query.input_ids) for query in row.queries),
        labels=sum(label != IGNORE_INDEX for label in labels),
    )
