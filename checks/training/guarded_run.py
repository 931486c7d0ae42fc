"""Three steps with the run's own losses and optimizer, with which the same steps under other conditions are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checks.training.steps import guarded_config, hypernet_values, light_model, loss_rows, shared

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

STEPS = 3


@dataclass(frozen=True)
class GuardedRun:
    """What the steps gave.

    Attributes:
        metrics: of each step.
        weights: the hypernetwork's parameters by name after each step.
    """

    metrics: Sequence[Any]
    weights: Sequence[dict[str, Tensor]]


def guarded_run(subject: "Subject") -> GuardedRun:
    """Return the steps as they are, taken once for all checks of a subject."""
    return shared(subject, "guarded_run", lambda: _run(subject))


def guarded_trainer(subject: "Subject") -> "Stepper":
    """Make a trainer at the start of these steps, in which evaluations may be made."""
    config = guarded_config(subject).model_copy(update={"eval_steps": 1000})
    return subject.implementation.trainer(light_model(subject, config), loss_rows(subject), config)


def _run(subject: "Subject") -> GuardedRun:
    trainer = guarded_trainer(subject)
    metrics, weights = [], []
    for _ in range(STEPS):
        metrics.append(trainer.step())
        weights.append(hypernet_values(trainer.model))
    return GuardedRun(metrics, weights)
