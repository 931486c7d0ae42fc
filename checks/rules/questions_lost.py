"""Every question of the records is in an epoch's batches once, beside its own document, or reported as dropped.

What it does
------------
Counts every question from the records to the batches: each must be in one batch of an epoch, or in the report of what was
dropped. A few records are packed again under limits that some of them exceed. A question whose teacher has one token
too many must be refused or reported.

Why it matters
--------------
Data that is lost without a word, in tokenizing or in packing, makes the run shorter and other than believed;
a batch that is lost in every epoch is data never seen. Questions about another document teach to ignore documents.

How it is detected
------------------
Kept and dropped questions together must be all, each kept one once, with the document of the same record.

How to fix
----------
List every record and question that is left out with its reason, and take each batch once an epoch.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from checks.data.epoch import EpochReading, gather
from checks.data.packed import readings
from checks.data.sizes import ROOM
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import D2LError, DataError

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "report what is dropped, keep documents with their own questions, and take every batch once an epoch"


def check(subject: "Subject") -> Result:
    """Count questions from the records to the batches."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    problems: list[str] = []
    found = readings(subject)
    for reading in found:
        problems += reading.lost.examples or _account_problems(reading)
    pairing = gather(found, "pairing")
    problems += pairing.examples
    problems += _teacher_problems(subject, found[0])
    own = found[0]
    evidence = {
        "records": len(own.records),
        "questions": len(own.seen),
        "in_batches": int(own.seen.sum()),
        "faults": problems[:8],
    }
    if problems:
        return Fail(
            message=f"questions are lost, doubled or beside another document: {len(problems)} accounts do not hold",
            expected="every question of the data once in an epoch's batches, beside its own document, or reported",
            actual=problems[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    dropped = int((own.seen == 0).sum())
    return Pass(
        f"{len(own.seen):,} questions of {len(own.records):,} records: {int(own.seen.sum()):,} in a batch once, "
        f"{dropped:,} reported as dropped",
        evidence,
    )


def _account_problems(reading: EpochReading) -> list[str]:
    """List what does not add up between the data, the report of what was dropped, and the batches."""
    assert reading.tokenized is not None
    assert reading.data is not None
    offsets, name, data = reading.data.offsets, reading.name, reading.data
    dropped = np.zeros(len(data), dtype=np.int64)
    for drop in reading.tokenized.dropped:
        first, last = offsets[drop.record], offsets[drop.record + 1]
        place = slice(first, last) if drop.query is None else slice(first + drop.query, first + drop.query + 1)
        dropped[place] += 1
    cases = {
        "in no batch and not reported as dropped": (reading.seen == 0) & (dropped == 0),
        "in more than one batch": reading.seen > 1,
        "reported as dropped and in a batch": (reading.seen > 0) & (dropped > 0),
    }
    problems = []
    for what, where in cases.items():
        if where.any():
            example = data.describe(int(np.flatnonzero(where)[0]))
            problems.append(f"{name}{int(where.sum()):,} of {len(data):,} questions are {what}: {example}")
    reported = (reading.tokenized.n_records, reading.tokenized.n_queries)
    if reported != (len(reading.records), len(data)):
        problems.append(
            f"{name}the summary counts {reported} records and questions of {len(reading.records), len(data)}"
        )
    return problems


def _teacher_problems(subject: "Subject", own: EpochReading) -> list[str]:
    """Let the run tokenize a record twice as long whose last question has a teacher of one token too many."""
    assert own.tokenized is not None
    assert own.data is not None
    number = next(iter(own.tokenized.rows)).record
    places = slice(own.data.offsets[number], own.data.offsets[number + 1])
    counts = [*(own.data.stops[places] - own.data.starts[places]).tolist()] * 2
    if not all(counts):
        return []  # the template refuses one of them
    counts[-1] += 1
    record = own.records[number]
    unusable = replace(
        record,
        prompts=record.prompts * 2,
        responses=record.responses * 2,
        logprobs_vals=tuple(((-0.5, -2.0),) * count for count in counts),
        logprobs_indices=tuple(((1, 3),) * count for count in counts),
    )
    config = changed(subject.config, max_qas_len=-1, max_qas_per_sample=-1, max_packed_inp_len=ROOM, cache=False)
    try:
        tokenized = subject.implementation.rows(config, subject.chat, (unusable,))
    except D2LError:
        return []
    if any(drop.query in (None, len(counts) - 1) for drop in tokenized.dropped):
        return []
    kept = sum(len(row.queries) for row in tokenized.rows)
    fate = "is kept" if kept == len(counts) else "is left out without a word"
    return [f"a question whose teacher has one token more than its answer {fate}: {own.data.describe(places.start)}"]


def _silent_questions(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Lose the last question of every row."""
    tokenized = healthy.rows(config, chat, records)
    rows = [replace(row, queries=row.queries[:-1]) for row in tokenized.rows if len(row.queries) > 1]
    return replace(tokenized, rows=tuple(rows) or tuple(tokenized.rows)[1:])


def _silent_document(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Lose the last document with its questions."""
    tokenized = healthy.rows(config, chat, records)
    rows = [*tokenized.rows]
    return replace(tokenized, rows=tuple(row for row in rows if row.record != rows[-1].record))


def _unreported(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Leave out what exceeds a limit without a word."""
    return replace(healthy.rows(config, chat, records), dropped=())


def _other_documents(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Put every row's questions beside the document of the row before."""
    tokenized = healthy.rows(config, chat, records)
    rows = [*tokenized.rows]
    moved = [replace(row, chunks=rows[index - 1].chunks) for index, row in enumerate(rows)]
    return replace(tokenized, rows=tuple(moved))


def _unusable_left_out(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Leave out a question that cannot be used without a word: the last of a record that is refused."""
    try:
        return healthy.rows(config, chat, records)
    except DataError:
        parts = ("prompts", "responses", "logprobs_vals", "logprobs_indices")
        kept = [replace(it, **{part: getattr(it, part) and getattr(it, part)[:-1] for part in parts}) for it in records]
        return healthy.rows(config, chat, kept)


RULE = Rule(
    code="DAT303",
    name="questions-lost",
    stage="data",
    severity="error",
    sources=("failure mode 6",),
    requires=("LBL101", "DAT301", "LBL301", "DAT302", "DAT304"),
    check=check,
    faults=(
        Fault("question-lost", "a question of every row is lost without a word", override(rows=_silent_questions)),
        Fault("document-lost", "a document is lost without a word", override(rows=_silent_document)),
        Fault("drops-unreported", "what exceeds a limit is left out without a word", override(rows=_unreported)),
        Fault("unusable-left-out", "a question with a wrong teacher is left out", override(rows=_unusable_left_out)),
        Fault(
            "batch-lost",
            "the last batch of an epoch is never taken",
            override(batches=lambda healthy, config, rows: [*healthy.batches(config, rows)][:-1]),
        ),
        Fault(
            "batch-twice",
            "a batch is taken twice in an epoch",
            override(
                batches=lambda healthy, config, rows: [
                    *healthy.batches(config, rows),
                    *healthy.batches(config, rows)[:1],
                ]
            ),
        ),
        Fault("document-of-another", "questions stand beside another document", override(rows=_other_documents)),
    ),
)
