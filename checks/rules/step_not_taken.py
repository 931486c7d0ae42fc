"""An optimizer step on the twin is taken from the weights that were given, by its own gradients alone, and moves the weights.

What it does
------------
Takes two optimizer steps with the run's own trainer on a twin, with the run's losses and optimizer, at a learning rate of
the probe's. Then two more over the same rows, at a learning rate so small that nothing moves, and compares the gradients that
the optimizer gets.

Why it matters
--------------
A run that stops at its first step costs the time of loading a base. One whose loss is NaN, or whose weights do not move, goes
on for hours. Weights that a trainer draws anew are not those of the seed; gradients that are not zeroed add up step after step.

How it is detected
------------------
A new trainer must leave the weights as they are. Loss and gradient norm of the steps must be finite and the weights must move.
The same step from the same weights must have the same gradients, to 1e-4 of each parameter's largest.

How to fix
----------
Follow the error where a step cannot be taken. Build the trainer around the weights that it is given, step every optimizer,
and zero the gradients before each step.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override, override_step
from checks.implementation import Implementation
from checks.probes import norm
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.steps import (
    TOLERANCE,
    guarded_config,
    hypernet_values,
    light_model,
    loss_rows,
    loss_step_again,
    worst_parameter,
)

if TYPE_CHECKING:
    from checks.subject import Subject

MOVING = "step the optimizer over all parameters of the hypernetwork; see `d2l explain STP202`"


def check(subject: "Subject") -> Result:
    """Take two steps that move the weights, then two that leave them."""
    config = guarded_config(subject)
    model = light_model(subject, config, dtype=torch.float32)
    given = hypernet_values(model)
    trainer = subject.implementation.trainer(model, loss_rows(subject), config)
    before = hypernet_values(model)
    if drawn := [name for name, value in given.items() if not torch.equal(value, before[name])]:
        return Fail(
            message="a new trainer changes the weights before its first step",
            expected="the weights that the model was built with",
            actual=f"{drawn[0]}, first of {len(drawn)} of {len(given)}, has other values",
            remedy="leave the weights alone when the trainer is built: they are those of the seed, or of a checkpoint",
        )
    try:
        steps = [trainer.step(), trainer.step()]
    except Exception as error:  # whatever stops a run at its first step is a finding about it
        return Fail(
            message="an optimizer step on the twin cannot be taken",
            expected="two steps",
            actual=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            remedy="run the step where the message says; the twin has the run's settings and random weights",
        )
    evidence = {"task_loss": [step.task_loss for step in steps], "grad_norm": [step.grad_norm for step in steps]}
    if finding := _still(before, hypernet_values(model), evidence):
        return finding
    if finding := _added_up(subject):
        return finding
    losses = " → ".join(f"{loss:.3g}" for loss in evidence["task_loss"])
    return Pass(
        f"two steps from the given weights: loss {losses}; the same step twice has the same gradients", evidence
    )


def _still(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], evidence: dict[str, Any]) -> Result | None:
    """Look for numbers that are not finite, and for weights that did not move."""
    if not all(math.isfinite(number) for numbers in evidence.values() for number in numbers):
        return Fail(
            message="a step on the twin is not finite",
            expected="finite loss and gradient norm",
            actual=str(evidence),
            remedy=MOVING,
            evidence=evidence,
        )
    broken = [name for name, value in after.items() if not value.isfinite().all()]
    if broken or all(torch.equal(after[name], before[name]) for name in after):
        return Fail(
            message="an optimizer step does not update the weights",
            expected="finite weights that move",
            actual=f"{broken[0]} is not finite" if broken else "no weight moved",
            remedy=MOVING,
            evidence=evidence,
        )
    return None


def _added_up(subject: "Subject") -> Result | None:
    """Take the same step twice from the same weights, and compare its gradients."""
    first, second = (step.gradients for step in loss_step_again(subject))
    if not (first and second):
        return Fail(
            message="a step does not update the weights: no optimizer steps in it",
            expected="every step to step the optimizer once",
            actual=f"parameters that are updated in the first step: {len(first)}, in the second: {len(second)}",
            remedy=MOVING,
        )
    error, name = worst_parameter(second, first)
    if error <= TOLERANCE:
        return None
    return Fail(
        message="a step has gradients of the step before it",
        expected=f"the same step from the same weights: norm {norm(first):.4g}",
        actual=f"norm {norm(second):.4g} at the second time; off by {error:.2g} of the largest in {name}",
        remedy="zero the gradients before every step",
        evidence={"norms": [norm(first), norm(second)]},
    )


def _undone(step: Any, trainer: Any) -> Any:
    """Restore the weights after every step."""
    before = hypernet_values(trainer.model)
    metrics = step()
    for name, parameter in trainer.model.hypernet.named_parameters():
        parameter.data.copy_(before[name])
    return metrics


def _drawn_anew(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Scale the weights when a trainer is built."""
    trainer = healthy.trainer(model, rows, config)
    with torch.no_grad():
        for parameter in model.hypernet.parameters():
            parameter.mul_(1.5)
    return trainer


def _never_zeroed(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Add to every gradient all that came before it."""
    for parameter in model.hypernet.parameters():
        past = torch.zeros_like(parameter)
        parameter.register_hook(lambda gradient, past=past: past.add_(gradient).clone())
    return healthy.trainer(model, rows, config)


RULE = Rule(
    code="STP202",
    name="step-not-taken",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 10"),
    requires=("GRD201", "GRD204"),
    check=check,
    faults=(
        Fault("nothing-moves", "a step leaves the weights as they were", override_step(_undone)),
        Fault("drawn-anew", "a trainer changes the weights that it is given", override(trainer=_drawn_anew)),
        Fault("never-zeroed", "gradients of all steps add up", override(trainer=_never_zeroed).in_trainer("step")),
    ),
)
