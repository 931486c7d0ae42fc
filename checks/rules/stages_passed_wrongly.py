"""A curriculum's stage ends when the moving average of exact match is high enough, and the next step reads the next stage.

What it does
------------
Takes six real steps of a light twin through four stages whose questions it is made to answer right, right, wrong and
right, and looks at which documents every step reads.

Why it matters
--------------
A stage that ends at once leaves easy documents before anything is learnt, and the run never recovers on the hard ones; a
stage that goes on to the end of its epoch, or never ends, spends the budget on what is known. The loss looks plausible in
each case.

How it is detected
------------------
The average is 0.9 times itself and 0.1 times a step's exact match, from zero in every stage. The stage of each step
follows from it; every document that is read must be of that stage.

How to fix
----------
Observe the exact match of whole steps, end a stage at its `passing`, and begin an epoch of the next stage's documents.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.observed import observed_step
from checks.training.short_run import rows_read, unique_rows
from checks.training.staged_run import PER_STAGE, PER_STEP, Stage, staged_trainer

if TYPE_CHECKING:
    from checks.subject import Subject

# All in the middle of an epoch: the first ends with step 1 (0.1), the second with step 4 (0.1, 0.19, 0.271), the third never.
STAGES = (Stage(0.05), Stage(0.25), Stage(0.05, answered=False), Stage(0.9))
STEPS = 6
DECAY = 0.9


def check(subject: "Subject") -> Result:
    """Compare the documents that each step reads with those of its stage."""
    trainer = staged_trainer(subject, STAGES, learning_rate=1e-30, weight_decay=0.0)  # answers stay as they are
    rows = unique_rows(PER_STAGE * len(STAGES))
    found = []
    for step, stage in enumerate(_stages(), start=1):
        documents, _ = rows_read(observed_step(trainer), rows)
        found.append(sorted({document // PER_STAGE for document in documents}))
        if len(documents) != PER_STEP or found[-1] != [stage]:
            names = " and ".join(str(1 + other) for other in found[-1])
            return Fail(
                message="a step reads documents of another stage of the curriculum than its own",
                expected=f"step {step}: {PER_STEP} documents of stage {1 + stage}",
                actual=f"{len(documents)} documents of stage {names}",
                remedy="end a stage when the moving average of exact match passes, and begin the next one's epoch at once",
                evidence={"stages by step": found},
            )
    return Pass(f"{STEPS} steps read the documents of stages {', '.join(str(1 + s) for s in _stages())}")


def _stages() -> Sequence[int]:
    """Return the stage of each step, counted from 0, by the formula of the moving average."""
    stages, stage, average = [], 0, 0.0
    for _ in range(STEPS):
        stages.append(stage)
        average = DECAY * average + (1 - DECAY) * STAGES[stage].answered
        if average >= STAGES[stage].passing and stage < len(STAGES) - 1:
            stage, average = stage + 1, 0.0
    return stages


def _with_passing(passing: float) -> Any:
    """Make a fault of stages that end at another average."""

    def trainer(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
        stages = tuple(stage.model_copy(update={"passing": passing}) for stage in config.curriculum)
        return healthy.trainer(model, rows, changed(config, curriculum=stages))

    return override(trainer=trainer)


RULE = Rule(
    code="CUR201",
    name="stages-passed-wrongly",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("LSS203", "EPO201"),
    check=check,
    faults=(
        Fault("never-passed", "a stage never ends", _with_passing(1.0)),
        Fault("passed-at-once", "a stage ends with its first right answer", _with_passing(0.01)),
    ),
)
