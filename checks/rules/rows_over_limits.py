"""Batches, rows and chunks keep the limits of the configuration.

What it does
------------
Measures the packed batches of an epoch, all of them: tokens of questions and of documents in each batch, tokens and
questions of each row, the length and number of each document's chunks. A few records are packed again under tight
limits, so that limits that the run's data never reaches are tried too; and one row under limits that it fills exactly.

Why it matters
--------------
Limits are what memory was computed with: a batch of twice the length runs out of it hours later, at the longest rows. A
chunk or question that is longer than the base was trained for is read badly, and nothing reports it.

How it is detected
------------------
Sizes are counted on the batches themselves, by the restarts of positions, and compared with `max_packed_inp_len`,
`max_packed_ctx_len`, `max_qas_len`, `max_qas_per_sample`, `max_ctx_chunk_len`, `max_ctx_chunk_num`, `max_ctx_len` and
the base's `max_position_embeddings`.

How to fix
----------
Pack rows by both budgets, split or drop what exceeds a limit as a whole, and report it; never shorten it.
"""

from typing import TYPE_CHECKING, Any

from checks.data.epoch import gather
from checks.data.packed import readings
from checks.faults import Override, override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "keep the limit that is named when rows are made and packed, or raise it in the configuration"


def check(subject: "Subject") -> Result:
    """Compare the sizes of all batches with the limits."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    found = readings(subject)
    problems, own = gather(found, "sizes"), found[0]
    if finding := _just_fitting(subject):
        return finding
    batches = sum(reading.batches for reading in found)
    evidence: dict[str, Any] = {"batches": batches, "longest": list(own.longest), "faults": problems.examples}
    if own.batches:
        evidence["context_tokens_per_row"] = own.context_tokens / own.batches
    if problems.count:
        return Fail(
            message=f"limits are exceeded {problems.count:,} times in {batches:,} batches",
            expected="every batch, row and chunk within the limits of the configuration",
            actual=problems.examples[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"at most {own.longest[0]:,} tokens of questions and {own.longest[1]:,} of documents in {own.batches:,} batches, "
        f"and {batches - own.batches} batches within tight limits",
        evidence,
    )


def _just_fitting(subject: "Subject") -> Result | None:
    """Pack one row under limits of its own size."""
    row = next(iter(subject.rows.rows))
    inputs, contexts = map(int, row.size)
    exact, roomy = (
        changed(subject.config, max_packed_inp_len=room * inputs, max_packed_ctx_len=room * contexts) for room in (1, 2)
    )
    packed = len(subject.implementation.batches(roomy, [row]))
    try:
        found = len(subject.implementation.batches(exact, [row]))
        if found == packed:  # none, where batches are lost: DAT303 reports it
            return None
        actual = f"{found} batches, and {packed} under limits of twice the size"
    except D2LError as error:
        actual = " ".join(str(error).split())
    return Fail(
        message="a row that fits the limits exactly is not packed",
        expected=f"one batch of a row of {inputs:,} tokens of questions and {contexts:,} of documents, where "
        f"max_packed_inp_len is {inputs:,} and max_packed_ctx_len {contexts:,}",
        actual=actual,
        remedy="compare a row's questions with max_packed_inp_len and its document with max_packed_ctx_len, by <=",
    )


def _overfull(healthy: Implementation, config: Any, rows: Any) -> Any:
    """Pack by twice the budgets."""
    budgets = {"max_packed_inp_len": 2 * config.max_packed_inp_len, "max_packed_ctx_len": 2 * config.max_packed_ctx_len}
    return healthy.batches(changed(config, **budgets), rows)


def _too_strict(healthy: Implementation, config: Any, rows: Any) -> Any:
    """Pack only rows that are shorter than the budgets, not those that fill them."""
    budgets = config.max_packed_inp_len, config.max_packed_ctx_len
    kept = [row for row in rows if row.size[0] < budgets[0] and row.size[1] < budgets[1]]
    return healthy.batches(config, kept) if kept else []


def _without(**limits: Any) -> Override:
    """Make a fault of rows that are made without some limits."""

    def rows(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
        return healthy.rows(changed(config, **limits), chat, records)

    return override(rows=rows)


RULE = Rule(
    code="DAT305",
    name="rows-over-limits",
    stage="data",
    severity="error",
    sources=("failure mode 6", "failure mode C2"),
    requires=("LBL101", "DAT301", "DAT302", "DAT304"),
    check=check,
    faults=(
        Fault("batches-overfull", "batches hold twice what the budgets allow", override(batches=_overfull)),
        Fault("full-rows-lost", "a row that fills a budget is not packed", override(batches=_too_strict)),
        Fault(
            "chunks-too-long",
            "max_ctx_chunk_len is not heeded",
            _without(max_ctx_chunk_len=-1, min_ctx_chunk_len=-1, num_chunk_probs=None),
        ),
        Fault("chunks-too-many", "max_ctx_chunk_num is not heeded", _without(max_ctx_chunk_num=None)),
        Fault("row-too-long", "max_qas_len is not heeded", _without(max_qas_len=-1)),
        Fault("row-too-full", "max_qas_per_sample is not heeded", _without(max_qas_per_sample=-1)),
        Fault("document-too-long", "max_ctx_len is not heeded", _without(max_ctx_len=-1)),
    ),
)
