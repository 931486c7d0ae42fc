"""The run trains on the data that it was given.

What it does
------------
Tokenizes the run's data, all of it, and counts records and questions that fit no row, with the reasons. The report has
a table for each data set: records, packed rows, splits, what was dropped, the supervised share, stop tokens, duplicates.

Why it matters
--------------
Items over a length limit are skipped at debug level elsewhere: the run is shorter and the data other than believed, and
the longest documents, the ones that matter, are the ones that are gone.

How it is detected
------------------
A warning for any record or question that is dropped, an error when more than a tenth of the questions is gone. Where
none is dropped because documents are cut short, nothing is judged: that is DAT304's.

How to fix
----------
Raise the limit that the message names, or set `max_ctx_chunk_len` to split long documents.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.data.epoch import gather
from checks.data.packed import readings
from checks.faults import configure
from checks.result import Fail, NotApplicable, Pass, Result, Skip, Warn
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import DataError

if TYPE_CHECKING:
    from checks.subject import Subject

LARGEST_SHARE = 0.1
REMEDY = "raise the limit that is named, or set max_ctx_chunk_len to split long documents"


def check(subject: "Subject") -> Result:
    """Count the questions kept, and the reasons why others are not."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    try:
        tokenized = subject.rows
    except DataError as error:
        return _unusable(subject, error)
    strange = [row.record for row in tokenized.rows if not 0 <= row.record < len(subject.records)]
    if strange:
        return Fail(
            message="rows name records that the data does not have",
            expected=f"record 0 to {len(subject.records) - 1}",
            actual=f"record {strange[0]}, in {len(strange)} of {len(tokenized.rows)} rows",
            remedy="let every row keep the index of the record that it was made of",
        )
    kept = sum(len(row.queries) for row in tokenized.rows)
    lost = tokenized.n_queries - kept
    reasons = Counter(drop.kind for drop in tokenized.dropped)
    evidence: dict[str, Any] = {
        "records": tokenized.n_records,
        "questions": tokenized.n_queries,
        "kept": kept,
        "reasons": dict(reasons),
        "dropped": [str(drop) for drop in tokenized.dropped[:8]],
    }
    found = readings(subject)
    evidence["datasets"] = found[0].datasets
    if not tokenized.dropped and gather(found, "documents").count:
        return Skip("no record is dropped, but the documents in the rows are not those of the data, as DAT304 reports")
    if not tokenized.dropped:
        return Pass(
            f"all {tokenized.n_records:,} records and {kept:,} questions are in {len(tokenized.rows):,} rows", evidence
        )
    share = lost / tokenized.n_queries
    counts = ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
    kind = Fail if share > LARGEST_SHARE else Warn
    return kind(
        message=f"{lost:,} of {tokenized.n_queries:,} questions are dropped",
        expected="every question in a row",
        actual=f"{share:.1%} dropped: {counts}; {tokenized.dropped[0]}",
        remedy=REMEDY,
        evidence=evidence,
    )


def _unusable(subject: "Subject", error: DataError) -> Result:
    """Report data that makes no rows; a teacher that fits the data and not the rows is the rows' fault."""
    records = [replace(record, logprobs_vals=None, logprobs_indices=None) for record in subject.records or ()]
    untaught = replace(subject, config=changed(subject.config, loss="ce", cache=False), records=tuple(records))
    try:
        found = readings(untaught)
    except DataError:
        found = ()
    problems = gather(found, "texts").examples + gather(found, "labels").examples
    if not problems:
        return Fail(
            message="the data cannot be used", expected="at least one row to train on", actual=str(error), remedy=REMEDY
        )
    return Fail(
        message="the teacher does not fit the rows, as they are not what the tokenizer library makes of the data",
        expected="the ids that the chat template and the tokenizer give for prompt i and response i, the answer supervised",
        actual=f"{problems[0]}; {str(error).splitlines()[0]}",
        remedy="make each conversation of one question and its own answer, and supervise that answer",
        evidence={"faults": problems},
    )


def _plant_tight_budget(subject: "Subject") -> "Subject":
    """Set a budget that at least half of the documents exceed."""
    if subject.tokenizer is None or subject.records is None:
        raise NotApplicable(subject.tokenizer_absent or subject.records_absent)
    lengths = sorted(row.size[1] for row in subject.rows.rows)
    return configure(max_packed_ctx_len=lengths[len(lengths) // 2] - 1)(subject)


RULE = Rule(
    code="DAT301",
    name="records-dropped",
    stage="data",
    severity="error",
    sources=("failure mode 6",),
    requires=("LBL101", "DAT307"),
    check=check,
    faults=(Fault("tight-budget", "at least half of the documents exceed max_packed_ctx_len", _plant_tight_budget),),
)
