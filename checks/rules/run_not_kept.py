"""A run's folder holds a checkpoint before the first step, the newest ones as many as configured, and the last step's.

What it does
------------
Trains the light twin for ten steps into a temporary folder as a run would, looks into the folder before the first step,
and opens what is left at the end.

Why it matters
--------------
A run that cannot save should fail before its first step, not hours in. A last step that is not saved is work for nothing;
one checkpoint instead of several leaves nothing to go back to when the newest one is spoilt.

How it is detected
------------------
Before the first step there must be a checkpoint; at the end, `save_total_limit` of them; and a run that is resumed from
the newest must have the weights of the last step, bit for bit.

How to fix
----------
Save before the first step, every `save_steps`, and after the last step; remove older checkpoints beyond `save_total_limit`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.kept_run import KEPT, STEPS, kept_run, other_trainer
from checks.training.steps import hypernet_values

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

REMEDY = "save before the first step, every save_steps and after the last one, and keep save_total_limit checkpoints"


def check(subject: "Subject") -> Result:
    """Look at what a run keeps, and resume from the newest of it."""
    run = kept_run(subject)
    resumed = other_trainer(subject)
    if run.kept:
        with run.written() as folder:
            resumed.resume(folder / run.kept[-1])
    evidence = {"steps": run.steps, "kept": [path.name for path in run.kept]}
    if run.steps != STEPS:
        return _finding("a run takes another number of steps", f"{STEPS} steps", f"{run.steps}", evidence)
    if not run.saved_before:
        return _finding("nothing is saved before the first step", "a checkpoint", "an empty folder", evidence)
    if len(run.kept) != KEPT:
        return _finding(
            "a run keeps another number of checkpoints", f"save_total_limit: {KEPT}", f"{len(run.kept)}", evidence
        )
    own = hypernet_values(resumed.model)
    other = [name for name, value in own.items() if not torch.equal(value, run.weights[name])]
    if other:
        actual = f"{run.kept[-1].name} holds another {other[0]}"
        return _finding("the last step is not in the newest checkpoint", "the weights at the end", actual, evidence)
    return Pass(
        f"{STEPS} steps: saved before the first, {KEPT} checkpoints kept, the last step in the newest", evidence
    )


def _finding(message: str, expected: str, actual: str, evidence: dict[str, Any]) -> Fail:
    return Fail(message=message, expected=expected, actual=actual, remedy=REMEDY, evidence=evidence)


def _newest_alone(healthy: Implementation, run: "Stepper", folder: Path) -> Sequence[Path]:
    """Keep the newest checkpoint only."""
    return healthy.train(run, folder)[-1:]


def _without_the_last(healthy: Implementation, run: "Stepper", folder: Path) -> Sequence[Path]:
    """Find the checkpoint of an earlier step as the newest."""
    kept = healthy.train(run, folder)
    return [kept[0], *kept[:-1]]


RULE = Rule(
    code="SAV202",
    name="run-not-kept",
    stage="twin",
    severity="error",
    sources=("fix 6", "failure mode 28"),
    requires=("SAV201",),
    check=check,
    faults=(
        Fault("newest-alone", "one checkpoint is kept of two", override(train=_newest_alone)),
        Fault("last-step-lost", "the last step is not saved", override(train=_without_the_last)),
    ),
)
