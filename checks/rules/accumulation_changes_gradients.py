"""A step of several micro-batches applies the gradient that one whole batch would.

What it does
------------
Lets the run's own trainer take one step on a twin over three contexts: packed into one batch, and as two micro-batches of
unequal numbers of contexts, questions, chunks and label tokens; with the mean over tokens and with the mean over contexts.

Why it matters
--------------
A loss that every micro-batch divides by its own number of tokens weighs short rows more, and the size of the gradient
depends on `gradient_accumulation_steps`: settings found with one value are wrong with another. A trainer that ignores the
key takes steps of a fraction of the batch that was planned.

How it is detected
------------------
The gradients that the optimizer gets must agree, parameter by parameter, to 1e-4 of the parameter's largest entry, in
float64; so must the loss that the step reports.

How to fix
----------
Divide sums by counts of the whole optimizer step: label tokens, contexts, ranks.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.faults import override, override_step
from checks.probes import norm
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.steps import CHUNKS, TOLERANCE, TWO_BATCHES, loss_step, worst_parameter

if TYPE_CHECKING:
    from checks.implementation import Implementation
    from checks.subject import Subject

MEANS = {False: "mean over tokens", True: "mean over contexts"}


def check(subject: "Subject") -> Result:
    """Compare the gradients of a whole step, packed and accumulated."""
    evidence: dict[str, Any] = {}
    for per_context, label in MEANS.items():
        mean = {"loss": "ce", "use_per_ctx_average_loss": per_context}
        steps = loss_step(subject, **mean), loss_step(subject, **mean, **TWO_BATCHES)
        whole, accumulated = (step.gradients for step in steps)
        error, name = worst_parameter(accumulated, whole)
        evidence[label] = {"relative_error": error, "norm_whole": norm(whole), "norm_accumulated": norm(accumulated)}
        if not error <= TOLERANCE:
            return Fail(
                message=f"gradients depend on how a step is cut into micro-batches ({label})",
                expected=f"entries within {TOLERANCE:g} of the largest of each parameter",
                actual=f"{error:.2g} in {name} (norm {norm(whole):.4g} in one batch, {norm(accumulated):.4g} in two)",
                remedy="take gradient_accumulation_steps micro-batches for every optimizer step, and divide losses by "
                "counts of the whole step, not of one micro-batch",
                evidence=evidence,
            )
        losses = [getattr(step.metrics, "task_loss", 1.0) for step in steps]
        evidence[label]["losses"] = losses
        if not abs(losses[1] / losses[0] - 1) <= TOLERANCE:
            return Fail(
                message=f"the loss that is reported depends on how a step is cut into micro-batches ({label})",
                expected=f"{losses[0]:.6g}, as in one batch",
                actual=f"{losses[1]:.6g} in two",
                remedy="report the sum of what the micro-batches add to the loss of the whole step",
                evidence=evidence,
            )
    errors = [found["relative_error"] for found in evidence.values()]
    return Pass(
        f"{len(CHUNKS)} contexts in one batch and in two micro-batches agree to {max(errors):.1g} of each parameter's largest",
        evidence,
    )


def _ignored(healthy: "Implementation", model: Any, rows: Any, config: Any) -> Any:
    """Take a step for every micro-batch."""
    return healthy.trainer(model, rows, changed(config, gradient_accumulation_steps=1))


def _weighed(healthy: "Implementation", model: Any, rows: Any, config: Any) -> Any:
    """Weigh every micro-batch by itself: a sum of two means."""
    if config.gradient_accumulation_steps > 1:
        for parameter in model.hypernet.parameters():
            weights = iter([0.5, 1.5] * 1000)
            parameter.register_hook(lambda gradient, weights=weights: gradient * next(weights))
    return healthy.trainer(model, rows, config)


def _mean_loss(step: Any, trainer: Any) -> Any:
    """Report the mean of what micro-batches add to the loss."""
    metrics = step()
    return replace(metrics, task_loss=metrics.task_loss / trainer.config.gradient_accumulation_steps)


RULE = Rule(
    code="GRD203",
    name="accumulation-changes-gradients",
    stage="twin",
    severity="error",
    sources=("failure mode 11", "huggingface/transformers#34191"),
    requires=("LSS201",),
    check=check,
    faults=(
        Fault("ignored", "a step takes one micro-batch", override(trainer=_ignored).in_trainer("step")),
        Fault("mean-reported", "the loss that is reported is a mean over micro-batches", override_step(_mean_loss)),
        Fault(
            "weighed-by-itself", "each micro-batch is weighed by itself", override(trainer=_weighed).in_trainer("step")
        ),
    ),
)
