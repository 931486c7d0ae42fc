"""An optimizer step on the twin is finite and moves the weights; a step that is not finite is refused.

What it does
------------
Takes two optimizer steps with the run's own trainer on the tiny twin. Then it plants a NaN in a parameter, requests
another step, and looks whether that is refused with nothing changed.

Why it matters
--------------
One NaN in a gradient turns every weight to NaN in the step that follows. Trainers that log NaN as 0.0, or compare it
with a threshold (`nan > t` is false), go on for hours and save checkpoints without a usable number in them.

How it is detected
------------------
Loss and gradient norm of the steps must be finite and the weights must move; with the planted NaN the trainer must raise
before the optimizer runs, and no other weight may change.

How to fix
----------
Before every `optimizer.step()`, require a finite loss, a finite gradient norm and a supervised token, over all ranks.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.probes import probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import Implementation
from d2l.errors import NonFiniteError

if TYPE_CHECKING:
    from checks.subject import Subject

GUARD = "require a finite loss and gradient norm before every optimizer.step()"


def check(subject: "Subject") -> Result:
    """Take two steps, then one that has to be refused."""
    model: Any = subject.twin()
    trainer = subject.implementation.trainer(model, probe_rows(subject), subject.twin_config)
    before = _values(model)
    steps = [trainer.step(), trainer.step()]
    evidence = {"task_loss": [step.task_loss for step in steps], "grad_norm": [step.grad_norm for step in steps]}
    after = _values(model)
    if not all(math.isfinite(number) for numbers in evidence.values() for number in numbers):
        return Fail(
            message="a step on the twin is not finite",
            expected="finite loss and gradient norm",
            actual=str(evidence),
            remedy=GUARD,
            evidence=evidence,
        )
    still = [name for name, value in after.items() if not value.isfinite().all()]
    if still or all(torch.equal(after[name], before[name]) for name in after):
        what = f"{still[0]} is not finite" if still else "no weight moved"
        return Fail(
            message="an optimizer step does not update the weights",
            expected="finite weights that move",
            actual=what,
            remedy=GUARD,
            evidence=evidence,
        )
    return _refusal(trainer, evidence)


def _refusal(trainer: Any, evidence: dict[str, Any]) -> Result:
    """Look at what the trainer does with a NaN in its first parameter."""
    name, parameter = next(iter(trainer.model.hypernet.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    before = _values(trainer.model)
    try:
        trainer.step()
    except NonFiniteError as error:
        evidence["refused_with"] = str(error).splitlines()[0]
    else:
        return Fail(
            message="a step that is not finite is taken",
            expected="NonFiniteError before the step",
            actual="the step",
            remedy=GUARD,
            evidence=evidence,
        )
    changed = [key for key, value in _values(trainer.model).items() if not value.equal(before[key]) and key != name]
    if changed:
        return Fail(
            message="a refused step changed weights",
            expected="no change",
            actual=f"{changed[0]} changed",
            remedy=GUARD,
            evidence=evidence,
        )
    return Pass(
        f"two steps: loss {evidence['task_loss'][0]:.3g} → {evidence['task_loss'][1]:.3g}; NaN is refused", evidence
    )


def _values(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.hypernet.named_parameters()}


def _unguarded(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Make a trainer whose NaN is logged as zero and stepped on."""
    trainer: Any = healthy.trainer(model, rows, config)
    step = trainer.step

    def careless() -> Any:
        try:
            return step()
        except NonFiniteError:
            trainer.optimizer.step()

    trainer.step = careless
    return trainer


def _frozen_optimizer(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Make a trainer whose optimizer holds no parameter of the hypernetwork."""
    trainer: Any = healthy.trainer(model, rows, config)
    for group in trainer.optimizer.param_groups:
        group["params"] = []
    return trainer


RULE = Rule(
    code="STP201",
    name="step-not-guarded",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 4", "failure mode 10"),
    requires=("GRD201", "GRD204"),
    check=check,
    faults=(
        Fault("no-guard", "a non-finite step is swallowed and taken", override(trainer=_unguarded)),
        Fault("empty-optimizer", "the optimizer holds no parameter", override(trainer=_frozen_optimizer)),
    ),
)
