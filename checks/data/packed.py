"""The packed batches of an epoch, read back once against the data and the oracle, for all checks of stage `data`.

Every difference is filed under one cause: labels, texts of questions, pairing of documents with questions, documents,
sizes. Batches of the run's own data are read, and those of a few of its records under tight limits (`checks.data.probes`),
so that chunks, splits and refusals are seen whatever the run's own limits are.
"""

import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checks.data.datasets import DatasetCounts
from checks.data.documents import DocumentReader
from checks.data.epoch import EpochReading
from checks.data.expected import conversation_format, expected_data
from checks.data.probes import TightRun, tight_runs
from checks.data.questions import QuestionReader
from checks.data.sizes import size_problems
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Tokenized

_latest: list[tuple[Any, tuple[EpochReading, ...]]] = []  # the subject that was read last, and its readings


def readings(subject: "Subject") -> tuple[EpochReading, ...]:
    """Read the run's own epoch, then those under tight limits, once for each subject; it has a tokenizer and records."""
    if _latest and _latest[0][0]() is subject:
        return _latest[0][1]
    assert subject.records is not None
    base_limit = getattr(subject.base_config, "max_position_embeddings", None)
    made = [_read(subject, TightRun("", subject.config, subject.records, base_limit), subject.rows)]
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        for run in tight_runs(subject, Path(folder)):
            try:
                tokenized = subject.implementation.rows(run.config, subject.chat, run.records)
            except D2LError as error:
                reading = EpochReading(f"{run.name}: ", run.config, run.records, None)
                made.append(_refused(reading, "the records are refused", error))
            else:
                made.append(_read(subject, run, tokenized))
    _latest[:] = [(weakref.ref(subject), tuple(made))]
    return tuple(made)


def _read(subject: "Subject", run: TightRun, tokenized: "Tokenized") -> EpochReading:
    """Read every batch of one epoch."""
    name = run.name and f"{run.name}: "
    reading = EpochReading(name, run.config, run.records, tokenized)
    data = expected_data(conversation_format(subject), run.records)
    questions, documents = QuestionReader(reading, data), DocumentReader(reading, data)
    datasets = DatasetCounts(run.records, set(data.form.tokenizer.get_added_vocab().values()))
    affixes = max(len(prefix) + len(suffix) for prefix, suffix in data.form.affixes)
    try:
        batches = subject.implementation.batches(run.config, tokenized.rows)
    except D2LError as error:
        return _refused(reading, "no batch can be made", error)
    for batch in batches:
        where = f"{name}batch {reading.batches}"
        reading.batches += 1
        lengths = batch.input_ids.shape[1], batch.ctx_ids.shape[1]
        reading.longest = max(reading.longest[0], lengths[0]), max(reading.longest[1], lengths[1])
        reading.context_tokens += lengths[1]
        chunks = _segments(batch.ctx_position_ids, sum(batch.n_ctx_chunks))
        asked = _segments(batch.position_ids, sum(batch.n_queries))
        for problem in size_problems(batch, chunks, asked, run.config, run.base_limit, affixes):
            reading.sizes.add(f"{where}: {problem}")
        if chunks is not None:
            documents.read(batch, chunks)
        elif asked is not None:  # else one cause spoils both, and is filed below
            reading.documents.add(f"{where}: positions do not restart at each of {sum(batch.n_ctx_chunks)} chunks")
        if asked is None:
            reading.texts.add(f"{where}: positions do not restart at each of {sum(batch.n_queries)} questions")
        else:
            questions.read(batch, asked)
            datasets.read(batch, asked)
    reading.seen, reading.data = questions.seen, data
    if not run.name:
        reading.datasets = datasets.table(tokenized)
    return reading


def _refused(reading: EpochReading, what: str, error: D2LError) -> EpochReading:
    """File an error of the implementation: everything is lost."""
    reading.lost.add(f"{reading.name}{what}: {str(error).splitlines()[0]}")
    return reading


def _segments(position_ids: Any, count: int) -> np.ndarray | None:
    """Return where segments start, by positions that restart, int64 [count]; None where they do not."""
    positions = position_ids[0].numpy()
    starts = np.flatnonzero(positions == 0)
    if len(starts) != count or not len(starts) or starts[0] != 0:
        return None
    lengths = np.diff([*starts, len(positions)])
    return starts if np.array_equal(positions, np.arange(len(positions)) - np.repeat(starts, lengths)) else None
