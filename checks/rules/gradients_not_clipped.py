"""Gradients are scaled down together to `max_grad_norm`, and only where they exceed it.

What it does
------------
Takes the same step on a twin three times, with a limit that nothing reaches, with twice the gradient's norm as the limit,
and with one below it, and records the gradients that the optimizer gets. Those of the parameters are brought to similar sizes
before, so that none is too small for the norm of all to show whether it counts.

Why it matters
--------------
Without clipping one odd batch throws the weights far off; clipping by parameter, or to a norm of one in any case, gives
another direction or another step size than the configuration says. The loss falls in all three cases.

How it is detected
------------------
Below the limit gradients must stay as they are; above it every one must be the unclipped one times limit over norm, to 1e-4.

How to fix
----------
Clip by the norm of all gradients together, after the last micro-batch and before the optimizer's step.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles.optimizer import clipped
from checks.probes import norm
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.steps import TOLERANCE, loss_step_anew, still_model, worst_parameter

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the gradients that the optimizer gets under a high limit and a low one with those under none."""
    with _of_similar_sizes(still_model(subject)):
        return _clipped_as_configured(subject)


@contextmanager
def _of_similar_sizes(model: Any) -> Iterator[None]:
    """Bring the parameters' gradients to norms of 1 and 2 by turns, so that none is too small to be missed in that of all."""

    def scaled(gradient: torch.Tensor, size: float) -> torch.Tensor:
        return gradient * (size / gradient.norm().clamp(min=1e-300))

    with ExitStack() as hooks:
        for number, parameter in enumerate(model.hypernet.parameters()):
            hooks.callback(parameter.register_hook(partial(scaled, size=1.0 + number % 2)).remove)
        yield


def _clipped_as_configured(subject: "Subject") -> Result:
    free = loss_step_anew(subject).gradients
    size = norm(free)
    limits = {"above the norm": 2 * size, "below the norm": 0.5}  # below that of every parameter too
    errors = {}
    for where, limit in limits.items():
        actual = loss_step_anew(subject, max_grad_norm=limit).gradients
        error, name = worst_parameter(actual, clipped(free, limit))
        errors[where] = error
        if not error <= TOLERANCE:
            return Fail(
                message=f"gradients are not clipped as configured, with max_grad_norm {where}",
                expected=f"norm {min(limit, size):.4g}: {size:.4g} without a limit, {limit:.4g} the limit",
                actual=f"norm {norm(actual):.4g}; off by {error:.2g} of the largest in {name}",
                remedy="clip by the norm of all gradients together, before optimizer.step(), and zero them before a step",
                evidence={"errors": errors, "norm": size},
            )
    return Pass(f"gradients of norm {size:.3g} stay under a limit above it, and are scaled to one below it", errors)


def _never(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    return healthy.trainer(model, rows, changed(config, max_grad_norm=1e30))


def _by_parameter(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Clip the gradient of each parameter by itself."""

    def clip(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * min(1.0, config.max_grad_norm / float(gradient.norm()))

    for parameter in model.hypernet.parameters():
        parameter.register_hook(clip)
    return healthy.trainer(model, rows, config)


RULE = Rule(
    code="OPT202",
    name="gradients-not-clipped",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("STP202", "BAS201"),
    check=check,
    faults=(
        Fault("never-clipped", "max_grad_norm is ignored", override(trainer=_never).in_trainer("step")),
        Fault(
            "clipped-by-parameter",
            "each parameter is clipped by itself",
            override(trainer=_by_parameter).in_trainer("step"),
        ),
    ),
)
