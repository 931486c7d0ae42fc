"""A run evaluates itself after every `eval_steps` steps and after its last one, on the held-out documents of its stage.

What it does
------------
Lets the run's own loop take five steps of a light twin, of which the first ends a stage, with an evaluation every two, and
looks at which held-out documents are read after which step.

Why it matters
--------------
A curve of other steps than it says, or of the documents of the first stage while the run is in the third, is believed: it
flattens, or jumps, where nothing happened. A run that is not evaluated at its end is judged by an older checkpoint.

How it is detected
------------------
No token of a held-out document occurs anywhere else, so the ids that the base reads name the documents. Every evaluation reads
all held-out documents of the stage that the run is in, and none of another. Skipped where the implementation has no loop of
its own.

How to fix
----------
Evaluate after steps that `eval_steps` divides, and after the last; choose the documents by the stage of the curriculum.
"""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.observed import observing
from checks.training.short_run import unique_rows
from checks.training.staged_run import PER_STAGE, Stage, staged_trainer

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Row

STAGES = (Stage(0.05), Stage(0.9, answered=False), Stage(0.9))  # the first ends with the first step, the second never
STAGE = 1  # of every evaluation
STEPS, EVERY, HELDOUT = 5, 2, 2  # documents held out for each stage
EXPECTED = {2, 4, 5}  # steps that are followed by an evaluation
PLAN: dict[str, Any] = {"max_steps": STEPS, "eval_steps": EVERY, "eval_documents": HELDOUT, "save_steps": STEPS}


def check(subject: "Subject") -> Result:
    """Compare what is read between steps with the held-out documents of the stage."""
    trained = PER_STAGE * len(STAGES)
    rows = unique_rows(trained + HELDOUT * len(STAGES))[trained:]
    heldout = [rows[start : start + HELDOUT] for start in range(0, len(rows), HELDOUT)]
    found = _read_after_steps(subject, heldout)
    expected = {step: list(range(STAGE * HELDOUT, (STAGE + 1) * HELDOUT)) for step in EXPECTED}
    if found != expected:
        return Fail(
            message="a run is not evaluated when it should be, or on documents of another stage",
            expected=_named(expected),
            actual=_named(found),
            remedy="evaluate after steps that eval_steps divides, and after the last, on the documents of the run's stage",
        )
    return Pass(
        f"evaluated after steps {', '.join(map(str, sorted(found)))} of {STEPS}, on all held-out documents of the stage"
    )


def _read_after_steps(subject: "Subject", heldout: Sequence[Sequence["Row"]]) -> dict[int, list[int]]:
    """Train, and return which held-out documents were read after each step, counted through all stages."""
    trainer: Any = staged_trainer(subject, STAGES, learning_rate=1e-30, weight_decay=0.0, **PLAN)  # answers stay
    step = trainer.step
    read: list[int] = [0]  # how many calls of the embedding there were before each step, and at the end

    with observing(trainer.model) as seen, tempfile.TemporaryDirectory(prefix="d2l-") as folder:

        def counted() -> Any:
            read.append(len(seen.ids))
            return step()

        trainer.step = counted
        subject.implementation.train_evaluated(trainer, Path(folder), heldout)
    read.append(len(seen.ids))
    documents = {row.chunks[0][0]: index for index, row in enumerate(row for rows in heldout for row in rows)}
    found = {}
    for number, (start, end) in enumerate(pairwise(read)):
        tokens = torch.cat(seen.ids[start:end]).tolist() if end > start else []
        if among := sorted({documents[token] for token in tokens if token in documents}):
            found[number] = among
    return found


def _named(read: dict[int, list[int]]) -> str:
    """Say which documents of which stages were read after which steps."""
    parts = []
    for step, documents in sorted(read.items()):
        stages = sorted({1 + document // HELDOUT for document in documents})
        parts.append(f"step {step}: {len(documents)} of stage {' and '.join(map(str, stages))}")
    return "; ".join(parts) or "no evaluation"


def _with_stage(chosen: int) -> Any:
    """Make a fault of a run that evaluates the documents of one stage throughout."""

    def train(healthy: Implementation, run: Any, folder: Any, heldout: Any) -> None:
        healthy.train_evaluated(run, folder, [heldout[chosen]] * len(heldout))

    return override(train_evaluated=train)


def _with_setting(**values: int) -> Any:
    """Make a fault of this run's settings."""

    def trainer(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
        return healthy.trainer(model, rows, changed(config, **values) if config.eval_steps == EVERY else config)

    return override(trainer=trainer)


def _one_left_out(healthy: Implementation, run: Any, folder: Any, heldout: Any) -> None:
    """Read one of the two documents of a stage twice, and the other never."""
    healthy.train_evaluated(run, folder, [(rows[0], rows[0]) for rows in heldout])


RULE = Rule(
    code="EVL204",
    name="heldout-evaluated-elsewhere",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("EVL203", "OPT203", "CUR201"),
    check=check,
    faults=(
        Fault("first-stage", "the documents of the first stage are evaluated throughout", _with_stage(0)),
        Fault("last-stage", "the documents of the last stage are evaluated throughout", _with_stage(-1)),
        Fault("other-steps", "a run is evaluated every three steps instead of two", _with_setting(eval_steps=3)),
        Fault(
            "not-at-the-end", "the last step is not the last one for evaluations", _with_setting(max_steps=STEPS + 1)
        ),
        Fault(
            "one-left-out",
            "a document is left out, and another one is read twice",
            override(train_evaluated=_one_left_out),
        ),
    ),
)
