"""Every question of the data is in an epoch's batches once, beside its own document, or reported as dropped.

What it does
------------
Counts every question from the files to the batches. The files that `train_ds_names` names are read once more with plain
json and pyarrow; generated needles are counted by the configuration. Then each question must be in one batch of an
epoch, or in the report of what was dropped. A few records are packed again under limits that some of them exceed.

Why it matters
--------------
Data that is lost without a word, in reading, in tokenizing or in packing, makes the run shorter and other than believed;
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
from checks.faults import override
from checks.oracles.record_files import read_file
from checks.result import Fail, NotApplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import Implementation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.subject import Subject

NEEDLE = "needle"  # the name of generated data
REMEDY = "report what is dropped, keep documents with their own questions, and take every batch once an epoch"


def check(subject: "Subject") -> Result:
    """Count questions from the files to the batches."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    problems = [*_reading_problems(subject)]
    not_read = [name for name in subject.config.train_ds_names if name != NEEDLE and _content(subject, name) is None]
    found = readings(subject)
    for reading in found:
        problems += reading.lost.examples or _account_problems(reading)
    pairing = gather(found, "pairing")
    problems += pairing.examples
    own = found[0]
    evidence = {
        "records": len(own.records),
        "questions": len(own.seen),
        "in_batches": int(own.seen.sum()),
        "counted_as_read": not_read,
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
    source = "" if not not_read else f" (counted as they were read: {', '.join(not_read)})"
    return Pass(
        f"{len(own.seen):,} questions of {len(own.records):,} records{source}: {int(own.seen.sum()):,} in a batch once, "
        f"{dropped:,} reported as dropped",
        evidence,
    )


def _content(subject: "Subject", name: str) -> Any:
    """Return what a file holds, read independently; None for what cannot be."""
    return read_file(name, subject.config.max_train_samples_per_ds)


def _reading_problems(subject: "Subject") -> "Iterator[str]":
    """Yield the first difference between the files and the records that were read, for each name."""
    config, records = subject.config, subject.records or ()
    start = 0
    for name in config.train_ds_names:
        if name == NEEDLE:
            expected = _needle_counts(subject)
            actual = [len(record.prompts) for record in records[start : start + len(expected)]]
            if actual != expected:
                yield (
                    f"needles are lost: {sum(actual):,} questions of {len(actual):,} documents are generated, the "
                    f"configuration requests {sum(expected):,} of {len(expected):,}"
                )
            start += len(expected)
            continue
        content = _content(subject, name)
        if content is None:
            return  # how many there are is not known, so what follows cannot be placed
        read = records[start : start + len(content)]
        for number, (record, wanted) in enumerate(zip(read, content, strict=False)):
            if (record.context, record.prompts, record.responses) != wanted:
                yield f"record {number} of {name} is not what the file holds: {record.source}"
                break
        if len(read) != len(content):
            yield f"records are lost in reading: {len(read):,} of the {len(content):,} in {name}"
        start += len(content)
    if config.train_ds_names and start != len(records):
        yield f"records are not in the files: {len(records):,} were read, {start:,} are there"


def _needle_counts(subject: "Subject") -> list[int]:
    """Return the questions of each document that the configuration requests."""
    config = subject.config
    counts: list[int] = []
    for stage in config.stages:
        counts += [stage.pairs] * config.documents_of(stage)
    return counts if config.max_train_samples_per_ds is None else counts[: config.max_train_samples_per_ds]


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


def _plant_lost_record(subject: "Subject") -> "Subject":
    """Read all but the last record."""
    if subject.records is None or len(subject.records) < 2:
        raise NotApplicable(subject.records_absent or "there is one record only")
    return replace(subject, records=subject.records[:-1])


RULE = Rule(
    code="DAT303",
    name="questions-lost",
    stage="data",
    severity="error",
    sources=("failure mode 6",),
    requires=("LBL101", "DAT301", "LBL301", "DAT302", "DAT304"),
    check=check,
    faults=(
        Fault("record-not-read", "the last record of the data is not read", _plant_lost_record),
        Fault("question-lost", "a question of every row is lost without a word", override(rows=_silent_questions)),
        Fault("document-lost", "a document is lost without a word", override(rows=_silent_document)),
        Fault("drops-unreported", "what exceeds a limit is left out without a word", override(rows=_unreported)),
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
