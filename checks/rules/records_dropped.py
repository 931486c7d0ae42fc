"""The run trains on the data that it was given.

What it does
------------
Tokenizes the run's data, all of it, and counts records and questions that fit no row, with the reasons.

Why it matters
--------------
Items over a length limit are skipped at debug level elsewhere: the run is shorter and the data other than believed, and
the longest documents, the ones that matter, are the ones that are gone.

How it is detected
------------------
A warning for any record or question that is dropped, an error when more than a tenth of the questions is gone.

How to fix
----------
Raise the limit that the message names, or set `max_ctx_chunk_len` to split long documents.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

from checks.faults import configure
from checks.result import Fail, NotApplicable, Pass, Result, Skip, Warn
from checks.rule import Fault, Rule
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
        return Fail(
            message="the data cannot be used", expected="at least one row to train on", actual=str(error), remedy=REMEDY
        )
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
    requires=("LBL101",),
    check=check,
    faults=(Fault("tight-budget", "at least half of the documents exceed max_packed_ctx_len", _plant_tight_budget),),
)
