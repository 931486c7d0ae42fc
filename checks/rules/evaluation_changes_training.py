"""An evaluation in the middle of a run leaves the run as it is.

What it does
------------
Takes three optimizer steps of the twin twice from the same weights: one after the other, and with an evaluation of held-out
documents behind each of the first two.

Why it matters
--------------
An evaluation packs other rows, binds other documents' LoRAs, and turns gradients off. Whatever it leaves behind (evaluation mode,
so that nothing is checkpointed or dropped any more; a LoRA on the base; random numbers drawn) changes the steps after it without
a word, and a run can no longer be compared with one that evaluates less often.

How it is detected
------------------
Losses, gradient norms and weights have to be equal to the last bit; so have the modes of all modules, the hooks on the base, and
torch's random state before and after an evaluation.

How to fix
----------
Put back what an evaluation changes, in a finally block or by a context manager.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.guarded_run import STEPS, guarded_run, guarded_trainer
from checks.training.short_run import count_hooks
from checks.training.steps import hypernet_values, loss_rows

if TYPE_CHECKING:
    from checks.implementation import Implementation, Stepper
    from checks.subject import Subject

HELDOUT = 2  # rows, one of which can be read in place of the other


def check(subject: "Subject") -> Result:
    """Compare steps with evaluations between them with steps alone."""
    run = guarded_run(subject)
    plain = _measured(run.metrics, run.weights[-1])
    evaluated, left = _evaluated(subject)
    if left:
        return _finding(left)
    for name, expected in plain.items():
        if not torch.equal(evaluated[name], expected):
            what = f"{name} differs by {float((evaluated[name] - expected).abs().max()):.2g}"
            return _finding(f"after {STEPS} steps {what}")
    return Pass(f"{STEPS} steps with evaluations between them are those without, to the last bit")


def _evaluated(subject: "Subject") -> tuple[dict[str, torch.Tensor], str]:
    """Return weights and measurements after steps with evaluations between them, and what an evaluation left behind."""
    trainer, rows = guarded_trainer(subject), loss_rows(subject)
    metrics, left = [], ""
    for number in range(STEPS):
        metrics.append(trainer.step())
        if number < STEPS - 1 and not left:
            before = _state(trainer)
            subject.implementation.evaluate(trainer, rows[:HELDOUT])
            left = next(
                (f"an evaluation changes {name}" for name, it in _state(trainer).items() if it != before[name]), ""
            )
    return _measured(metrics, hypernet_values(trainer.model)), left


def _measured(metrics: Sequence[Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what is compared: weights, losses and gradient norms."""
    numbers = torch.tensor([[step.task_loss, step.grad_norm] for step in metrics], dtype=torch.float64)
    return {**weights, "loss or gradient norm": numbers}


def _state(trainer: "Stepper") -> dict[str, Any]:
    """Return what an evaluation could leave behind beside weights."""
    model = trainer.model
    modules = [*model.base.modules(), *model.hypernet.modules()]
    return {
        "the modes of modules": [module.training for module in modules],
        "hooks on the base": count_hooks(model),
        "which parameters have gradients": [it.grad is None for it in model.hypernet.parameters()],
        "torch's random state": torch.get_rng_state().tolist(),
    }


def _finding(actual: str) -> Fail:
    return Fail(
        message="an evaluation changes the run that it looks at",
        expected="the steps, modes, hooks and random numbers of a run without it, to the last bit",
        actual=actual,
        remedy="put back what an evaluation changes, in a finally block or by a context manager",
    )


def _draws_numbers(healthy: "Implementation", trainer: Any, rows: Any) -> Any:
    """Draw random numbers beside the evaluation."""
    scores = healthy.evaluate(trainer, rows)
    torch.rand(1)
    return scores


def _leaves_mode(healthy: "Implementation", trainer: Any, rows: Any) -> Any:
    """Leave the other mode behind."""
    scores = healthy.evaluate(trainer, rows)
    trainer.model.hypernet.train(not trainer.model.hypernet.training)
    return scores


def _leaves_weights(healthy: "Implementation", trainer: Any, rows: Any) -> Any:
    """Round a weight, as a copy to half precision and back does."""
    scores = healthy.evaluate(trainer, rows)
    weight = max(trainer.model.hypernet.parameters(), key=torch.Tensor.numel)
    weight.data.copy_(weight.data.bfloat16())
    return scores


RULE = Rule(
    code="EVL201",
    name="evaluation-changes-training",
    stage="twin",
    severity="error",
    sources=("failure mode C39",),
    requires=("STP202",),
    check=check,
    faults=(
        Fault("numbers-drawn", "an evaluation draws from torch's random numbers", override(evaluate=_draws_numbers)),
        Fault("mode-left", "an evaluation leaves the hypernetwork in another mode", override(evaluate=_leaves_mode)),
        Fault("weights-rounded", "an evaluation rounds a weight to bfloat16", override(evaluate=_leaves_weights)),
    ),
)
