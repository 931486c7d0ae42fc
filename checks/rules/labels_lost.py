"""After truncation and packing, every question of the run still has its whole answer as labels.

What it does
------------
Tokenizes and packs the run's own data, all of it, as the run would, and reads the labels back from the packed batches:
for each question the labelled text, decoded, against its response.

Why it matters
--------------
A mask that is right on one conversation proves nothing about the batches. Truncation from the right cuts the answer after
the mask was checked, and truncation from the left loses later spans; the loss is 0, gradients are NaN, and the token
counter rises. An answer without its stop token trains a model that never stops.

How it is detected
------------------
Every packed question must have labels, they must equal the input's ids, decode to a text with the whole response in it,
and end with the end token that the template wrote.

How to fix
----------
Raise `max_qas_len` and `max_packed_inp_len`, shorten the questions, and never truncate.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import Implementation

if TYPE_CHECKING:
    from checks.subject import Subject

IGNORE_INDEX = -100
REMEDY = "raise max_qas_len and max_packed_inp_len, or shorten the questions; answers must not be truncated"


def check(subject: "Subject") -> Result:
    """Compare the labels of every packed question with its responses."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    batches = subject.implementation.batches(subject.config, subject.rows.rows)
    faults: list[str] = []
    labels = tokens = questions = 0
    for batch in batches:
        labels, tokens = labels + batch.n_labels, tokens + batch.n_tokens
        questions += len(batch.queries)
        faults += _faults(subject, batch)
    evidence = {
        "questions": questions,
        "label_tokens": labels,
        "tokens": tokens,
        "batches": len(batches),
        "faults": faults[:8],
    }
    if faults:
        return Fail(
            message=f"labels are lost or wrong in {len(faults)} of {questions} packed questions",
            expected="each response, whole, with its end token",
            actual=faults[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"{labels:,} labels ({labels / tokens:.1%} of tokens) in {questions:,} questions of {len(batches)} batches",
        evidence,
    )


def _faults(subject: "Subject", batch: Any) -> list[str]:
    """List what is wrong with the questions of one batch, a line each."""
    assert subject.tokenizer is not None
    assert subject.records is not None
    stops = set(subject.tokenizer.get_added_vocab().values())
    contexts = torch.arange(len(batch.n_queries)).repeat_interleave(torch.tensor(batch.n_queries)).tolist()
    found = []
    starts = 0
    for context, length in zip(contexts, batch.queries.lengths, strict=True):
        piece = slice(starts, starts + length)
        starts += length
        ids, labels = batch.input_ids[0, piece], batch.labels[0, piece]
        record = subject.records[batch.record_ids[context]]
        kept = labels[labels != IGNORE_INDEX]
        text = subject.tokenizer.decode(kept)
        where = f"record {batch.record_ids[context]} ({record.source})"
        if len(kept) == 0:
            found.append(f"{where}: no label")
        elif not torch.equal(kept, ids[labels != IGNORE_INDEX]):
            found.append(f"{where}: labels are not the input's ids")
        elif not any(response.strip() in text for response in record.responses):
            found.append(f"{where}: {text[-60:]!r} holds none of its responses")
        elif stops and not any(int(token) in stops for token in kept[-2:]):
            found.append(f"{where}: {text[-60:]!r} does not end with a control token")
    return found


def _cut_answers(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Truncate questions from the right, behind the mask check: the last third of the answer is gone."""

    def cut(query: Any) -> Any:
        supervised = sum(label != IGNORE_INDEX for label in query.labels)
        keep = len(query.input_ids) - max(supervised // 3, 1)
        return replace(query, input_ids=query.input_ids[:keep], labels=query.labels[:keep])

    return _changed_queries(healthy.rows(config, chat, records), cut)


def _no_labels(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Lose every label."""
    return _changed_queries(
        healthy.rows(config, chat, records), lambda query: replace(query, labels=(IGNORE_INDEX,) * len(query.labels))
    )


def _changed_queries(tokenized: Any, change: Any) -> Any:
    rows = tuple(replace(row, queries=tuple(change(query) for query in row.queries)) for row in tokenized.rows)
    return replace(tokenized, rows=rows)


RULE = Rule(
    code="LBL301",
    name="labels-lost",
    stage="data",
    severity="error",
    sources=("fix 8", "failure mode F8", "failure mode 4", "failure mode 7", "failure mode 21"),
    requires=("LBL101", "DAT301"),
    check=check,
    faults=(
        Fault("answers-truncated", "truncation from the right, after the mask was made", override(rows=_cut_answers)),
        Fault("labels-all-ignored", "every label is -100", override(rows=_no_labels)),
    ),
)
