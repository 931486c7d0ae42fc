"""The exact match of a step is the share of its questions that are answered right from the first label to the last.

What it does
------------
Takes a real step of the light twin over questions of which some have the model's likeliest tokens as labels, one has all
but one, and the rest have others; and looks at the exact match that the step reports.

Why it matters
--------------
A curriculum ends a stage when this number is high enough, and people stop runs by it. Counted by tokens, or over the
micro-batch instead of the step, it is too high: the run leaves a stage that it has not learnt.

How it is detected
------------------
The likeliest tokens come from every question alone, with edited weights in an untouched model; the share must be the one
that follows from them. Skipped where steps report no exact match.

How to fix
----------
Count a question when each of its labels is the likeliest token, and divide by the questions of the whole step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.faults import override_step
from checks.offered import offered
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.answered import RIGHT, answered_rows
from checks.training.observed import observed_step
from checks.training.steps import TWO_BATCHES, light_config, loss_rows, shared, still_model

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the exact match of a step of two micro-batches with the share that the labels were made for."""
    model: Any = still_model(subject)
    rows = shared(subject, "answered_rows", lambda: answered_rows(model, loss_rows(subject)))
    total = sum(len(row.queries) for row in rows)
    config = light_config(subject, **TWO_BATCHES)
    step = observed_step(subject.implementation.trainer(model, rows, config))
    found, expected = float(offered(step.metrics, "exact_match")), len(RIGHT) / total
    evidence = {"exact_match": found, "expected": expected, "questions": total}
    if not abs(found - expected) < 1e-6:
        return Fail(
            message="the exact match of a step is not the share of its questions that are answered right",
            expected=f"{len(RIGHT)} of {total}: {expected:.4g}",
            actual=f"{found:.4g}",
            remedy="count a question when each of its labels is the likeliest token, over the questions of the whole step",
            evidence=evidence,
        )
    return Pass(f"{len(RIGHT)} of {total} questions are answered right, and a step reports {found:.3g}", evidence)


def _reporting(change: Callable[[float], float]) -> Any:
    """Make a fault of a trainer that reports another exact match."""

    def report(step: Any, trainer: Any) -> Any:
        metrics = step()  # None where another fault leaves a step out
        return metrics and replace(metrics, exact_match=change(metrics.exact_match))

    return override_step(report)


RULE = Rule(
    code="LSS203",
    name="exact-match-wrong",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("GRD203",),
    check=check,
    faults=(
        Fault("one-too-many", "a question that is nearly right counts", _reporting(lambda share: share + 1 / 6)),
        Fault("always-one", "every step reports that all is right", _reporting(lambda share: 1.0)),
    ),
)
