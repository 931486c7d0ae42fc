"""An epoch reads every row once, its question with its own document, and the next epoch reads them in another order.

What it does
------------
Lets the run's own trainer go through two epochs of five rows on a twin, one row to a micro-batch and two micro-batches to a
step; an epoch's last step takes a row of the next epoch, or is shorter. No two rows share a token, so the token ids that the
base's embedding gets tell which documents and questions a step reads.

Why it matters
--------------
A batch that is skipped in every epoch, the same batch in every step, an epoch without its last batch, or an order that never
changes: the loss falls in each case, on part of the data.

How it is detected
------------------
Of ten rows that are read, the first five and the last five must be all rows. A step must read as many as it has micro-batches,
fewer only at the end of an epoch, and the documents of the questions that it reads; the second epoch's order must differ from
the first's.

How to fix
----------
Move the position in the data by what was taken, begin the next epoch where one is used up, and shuffle with the seed and the
epoch's number.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.short_run import PER_STEP, ROWS, rows_read, short_run

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = (
    "take the micro-batches of a step one after another, each row of an epoch once, and shuffle anew for every epoch"
)


def check(subject: "Subject") -> Result:
    """Follow the rows through two epochs."""
    run = short_run(subject)
    read = [rows_read(step, run.rows) for step in run.steps]
    order = [row for _, questions in read for row in questions]
    evidence = {"questions": [questions for _, questions in read]}

    def finding(message: str, expected: str, actual: str) -> Fail:
        return Fail(message=message, expected=expected, actual=actual, remedy=REMEDY, evidence=evidence)

    taken = 0
    for number, (documents, questions) in enumerate(read, start=1):
        taken += len(questions)
        if len(questions) != PER_STEP and not (0 < len(questions) < PER_STEP and taken % ROWS == 0):
            return finding(
                "a step does not take its micro-batches",
                f"{PER_STEP} rows in step {number}, one in each micro-batch",
                f"{len(questions)}",
            )
        if sorted(documents) != sorted(questions):
            return finding(
                "questions are read with another row's document",
                f"documents of rows {sorted(questions)} in step {number}",
                f"of rows {sorted(documents)}",
            )
    epochs = order[:ROWS], order[ROWS : 2 * ROWS]
    for number, epoch in enumerate(epochs, start=1):
        if sorted(epoch) != list(range(ROWS)):
            return finding(
                f"epoch {number} does not read every row once",
                f"rows {list(range(ROWS))}, in any order",
                f"rows {epoch}",
            )
    if epochs[0] == epochs[1]:
        return finding("the second epoch repeats the order of the first", "another order", f"{epochs[1]} again")
    return Pass(f"two epochs of {ROWS} rows, {PER_STEP} in a step: every row once, in two orders", evidence)


def _last_row_lost(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Leave a row out, and read another one twice."""
    rows = list(rows)
    return healthy.trainer(model, [*rows[:-1], rows[0]] if len(rows) == ROWS else rows, config)


def _always_anew(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Begin the data anew for every step."""
    return healthy.trainer(model, list(rows)[:PER_STEP] if len(rows) == ROWS else rows, config)


RULE = Rule(
    code="EPO201",
    name="rows-not-visited-once",
    stage="twin",
    severity="error",
    sources=("failure mode 6", "failure mode 27"),
    requires=("GRD203",),
    check=check,
    faults=(
        Fault(
            "row-lost",
            "a row is left out and another one read twice",
            override(trainer=_last_row_lost).in_trainer("step"),
        ),
        Fault("same-batches", "every step reads the same batches", override(trainer=_always_anew).in_trainer("step")),
    ),
)
