"""Tokenization of records into rows: the document in chunks, its questions as conversations without the document.

Nothing is truncated. A document or question that exceeds a limit is dropped as a whole and listed in the result.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2l.data.chat.format import ChatFormat
from d2l.data.chunks import Ids, chunk_document
from d2l.data.limits import (
    DoesNotFitError,
    Limits,
    check_question_length,
    check_question_text,
)
from d2l.data.logprobs import check_logprobs, list_top_k_examples
from d2l.data.records import Record, listing
from d2l.errors import DataError

IGNORE_INDEX = -100  # label of a token that is not supervised; the value that torch's cross-entropy skips
_SURELY_SHORT = (
    10_000  # characters of a question and its answer: tokenizing fewer takes less than looking at the limits
)

OnProgress = Callable[[int, int], None]  # called with the number of records done, and of all records


@dataclass(frozen=True)
class Query:
    """A question and its answer: `labels[t]` is `input_ids[t]` where supervised, else -100.

    The first token is never supervised: no token before it predicts it. `logprobs_vals` and
    `logprobs_indices` are a teacher's top-k, [supervised token][k].
    """

    input_ids: Ids
    labels: Ids
    logprobs_vals: Sequence[tuple[float, ...]] | None = None
    logprobs_indices: Sequence[Ids] | None = None

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.input_ids) > 0
        assert self.labels[0] == IGNORE_INDEX

    @property
    def n_labels(self) -> int:
        """Number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class Row:
    """A document in chunks with questions about it, the unit of packing. `record` is the index of its record."""

    record: int
    chunks: tuple[Ids, ...]
    queries: tuple[Query, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Number of tokens of the queries, and of the chunks."""
        return sum(len(query.input_ids) for query in self.queries), sum(map(len, self.chunks))


@dataclass(frozen=True)
class Dropped:
    """A record (`query` is None), or one of its questions, that is in no row. `kind` groups reasons for counting."""

    record: int
    source: str
    query: int | None
    kind: str
    reason: str

    def __str__(self) -> str:
        what = f"record {self.record}" if self.query is None else f"record {self.record}, prompt {self.query}"
        return f"{what} ({self.source}): {self.reason}"


@dataclass(frozen=True)
class TokenizedPart:
    """Result for some of the records. `problems`: questions that cannot be used; `top_k`: each k of a teacher (0: none)."""

    rows: tuple[Row, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    problems: tuple[str, ...] = ()
    top_k: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Tokenized:
    """Rows of all records, and what was dropped. `str()` is a summary on one screen."""

    rows: Sequence[Row]
    dropped: tuple[Dropped, ...]
    n_records: int
    n_queries: int

    def __str__(self) -> str:
        kept_queries = sum(len(row.queries) for row in self.rows)
        kept_records = len({row.record for row in self.rows})
        lines = [
            f"{kept_records:,} of {self.n_records:,} records with {kept_queries:,} of {self.n_queries:,} questions "
            f"in {len(self.rows):,} rows"
        ]
        for kind, count in Counter(drop.kind for drop in self.dropped).most_common():
            named = listing([str(drop) for drop in self.dropped if drop.kind == kind])
            lines.append(f"{kind}: {count:,} dropped\n{named}")
        return "\n".join(lines)


def tokenize_records(
    records: Sequence[Record],
    chat: ChatFormat,
    limits: Limits,
    seed: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Tokenized:
    """Tokenize records into rows.

    Args:
        chat: format of questions with answers, and of the message around a document.
        limits: length limits of the run.
        seed: seed for drawing chunk counts by `limits.num_chunk_probs`, for each record on its own, so that a record's
            rows do not depend on the others. None (evaluation): as few chunks as fit.
        on_progress: called after every record.

    Raises:
        ConfigError: `max_ctx_chunk_len` has no room for text.
        DataError: a teacher's logprobs do not match the labels, the template refuses a record, or no row is left.
    """
    parts = []
    for index, record in enumerate(records):
        parts.append(tokenize_record(index, record, chat, limits, seed))
        on_progress(index + 1, len(records))
    return combine_parts(records, tuple(row for part in parts for row in part.rows), parts)


def tokenize_record(index: int, record: Record, chat: ChatFormat, limits: Limits, seed: int | None) -> TokenizedPart:
    """Tokenize one record, independently of the others; see `tokenize_records`.

    Raises:
        ConfigError: `max_ctx_chunk_len` has no room for text.
    """
    generator = None if seed is None else random.Random(f"{seed}:{index}")
    try:
        chunks = chunk_document(record.context, chat, limits, generator)
    except DoesNotFitError as error:
        return TokenizedPart(dropped=(Dropped(index, record.source, None, error.kind, str(error)),))
    except DataError as error:
        return TokenizedPart(problems=(f"record {index}, document ({record.source}): {_first_line(error)}",))
    queries: list[Query] = []
    dropped: list[Dropped] = []
    problems: list[str] = []
    for position in range(len(record.prompts)):
        try:
            query = _make_query(record, position, chat, limits)
            check_question_length(len(query.input_ids), limits)
        except DoesNotFitError as error:
            dropped.append(Dropped(index, record.source, position, error.kind, str(error)))
        except DataError as error:
            problems.append(f"record {index}, prompt {position} ({record.source}): {_first_line(error)}")
        else:
            queries.append(query)
    rows = tuple(Row(index, chunks, group) for group in split_queries(queries, limits))
    top_k = frozenset(len(query.logprobs_vals[0]) if query.logprobs_vals else 0 for query in queries)
    return TokenizedPart(rows, tuple(dropped), tuple(problems), top_k)


def combine_parts(records: Sequence[Record], rows: Sequence[Row], parts: Sequence[TokenizedPart]) -> Tokenized:
    """Combine the parts of all records with their rows, which are not read from the parts.

    Raises:
        DataError: a question cannot be used, teachers differ in k, or no row is left.
    """
    problems = [problem for part in parts for problem in part.problems]
    if problems:
        raise DataError(f"{len(problems):,} questions or documents cannot be used:\n{listing(problems)}")
    top_k = {k for part in parts for k in part.top_k}
    if len(top_k) > 1:
        raise DataError(
            "every record needs the same number of teacher logprobs per token (0: none), found\n"
            + list_top_k_examples(records, top_k)
        )
    dropped = tuple(drop for part in parts for drop in part.dropped)
    result = Tokenized(rows, dropped, len(records), sum(len(record.prompts) for record in records))
    if not rows:
        raise DataError(f"no row is left to train on: {result}")
    return result


def _make_query(record: Record, position: int, chat: ChatFormat, limits: Limits) -> Query:
    """Tokenize one question with its answer, without the document; raises `DataError` where it cannot be used."""
    prompt, response = record.prompts[position], record.responses[position]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if len(prompt) + len(response) > _SURELY_SHORT:
        check_question_text(chat.render(messages), chat.least_tokens, limits)
    encoded = chat.encode(messages)
    labels = labels_from_mask(encoded.input_ids, encoded.supervised)
    n_labels = len(labels) - labels.count(IGNORE_INDEX)
    if not n_labels:
        raise DoesNotFitError("nothing supervised", "the chat template marks no token of the answer as the assistant's")
    if record.logprobs_vals is None or record.logprobs_indices is None:
        return Query(tuple(encoded.input_ids), labels)
    vals, indices = record.logprobs_vals[position], record.logprobs_indices[position]
    check_logprobs(vals, indices, n_labels)
    return Query(tuple(encoded.input_ids), labels, vals, indices)


def _first_line(error: DataError) -> str:
    return str(error).splitlines()[0]


def labels_from_mask(input_ids: Sequence[int], supervised: Sequence[bool]) -> Ids:
    """Return the ids where supervised, else -100; the first token, which nothing predicts, is never supervised."""
    marked = zip(input_ids[1:], supervised[1:], strict=True)
    return (IGNORE_INDEX, *(token if on else IGNORE_INDEX for token, on in marked))


def split_queries(queries: Sequence[Query], limits: Limits) -> list[tuple[Query, ...]]:
    """Split a record's questions, in order, into groups for one row each, within the limits."""
    most_tokens = min((n for n in (limits.max_qas_len, limits.max_packed_inp_len) if n >= 0), default=math.inf)
    most = limits.max_qas_per_sample if limits.max_qas_per_sample >= 0 else math.inf
    groups: list[list[Query]] = []
    tokens = 0
    for query in queries:
        length = len(query.input_ids)
        if not groups or tokens + length > most_tokens or len(groups[-1]) >= most:
            groups.append([])
            tokens = 0
        groups[-1].append(query)
        tokens += length
    return [tuple(group) for group in groups]
