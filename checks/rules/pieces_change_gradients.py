"""A hypernetwork that reads documents in pieces gives the loss and the gradients that it gives at once.

What it does
------------
Takes one step of the run's own trainer on a twin over three documents of several chunks twice: as the twin takes it, all in
one go, and in the smallest pieces, a chunk under one layer's features each, as documents of a real run's lengths are read.

Why it matters
--------------
At the published shapes every step reads in pieces, whose values are forgotten after the forward and computed again in the
backward; a twin, and a trial on short texts, never does. A piece that is read under another one's tokens, or a recomputation
that loses the gradient from above, trains the hypernetwork on something else, on the GPU alone.

How it is detected
------------------
The loss must agree to 1e-4, and the gradients that the optimizer gets, parameter by parameter, to 1e-4 of the parameter's
largest entry, in float64. Modules of the hypernetwork must have run more often in pieces: else nothing is judged here.

How to fix
----------
Recompute each piece under its own chunks and layers, and hand it its own part of the gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import Override, override
from checks.implementation import Implementation
from checks.probes import norm
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.training.steps import TOLERANCE, loss_step_anew, loss_step_in_pieces, still_model, worst_parameter
from d2l.hypernet import recompute

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare a step that reads its documents in pieces with one that reads them at once."""
    with _counted_calls(still_model(subject)) as calls:
        whole = loss_step_anew(subject)
        at_once = len(calls)
        pieces = loss_step_in_pieces(subject)
    error, name = worst_parameter(pieces.gradients, whole.gradients)
    losses = [float(getattr(step.metrics, "task_loss", 1.0)) for step in (whole, pieces)]
    errors = {"loss": abs(losses[1] / losses[0] - 1), f"gradient of {name}": error}
    worst = max(errors, key=lambda what: errors[what])
    evidence = {"errors": errors, "norm_at_once": norm(whole.gradients), "norm_in_pieces": norm(pieces.gradients)}
    if not max(errors.values()) <= TOLERANCE:
        return Fail(
            message="a hypernetwork that reads documents in pieces trains otherwise",
            expected=f"loss {losses[0]:.6g} and gradients of norm {norm(whole.gradients):.4g}, as at once",
            actual=f"loss {losses[1]:.6g} and norm {norm(pieces.gradients):.4g}, off by {errors[worst]:.2g} in the {worst}",
            remedy="recompute each piece under its own chunks and layers, and hand it its own part of the gradient",
            evidence=evidence,
        )
    if len(calls) - at_once <= at_once:
        return Skip("no module of the hypernetwork runs more often where documents are read in pieces")
    return Pass(f"loss and gradients in the smallest pieces agree to {max(errors.values()):.1g}", evidence)


@contextmanager
def _counted_calls(model: Any) -> Iterator[list[None]]:
    """Yield a list that grows with every call of a module of the hypernetwork that has no parts."""
    calls: list[None] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: calls.append(None))
        for module in model.hypernet.modules()
        if not any(module.children())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _where(place: Any, name: str, value: Callable[..., Any]) -> Override:
    """Make a fault that puts something into a module while documents are read in pieces."""

    @contextmanager
    def changed() -> Iterator[None]:
        before = getattr(place, name)
        setattr(place, name, value)
        try:
            yield
        finally:
            setattr(place, name, before)

    @contextmanager
    def in_pieces(healthy: Implementation) -> Iterator[None]:
        with healthy.in_pieces(), changed():
            yield

    return override(in_pieces=in_pieces)


def _without_gradient_from_above(outputs: Any, inputs: Any, gradient: Any = None, **options: Any) -> Any:
    return _grad(outputs, inputs, None if gradient is None else torch.ones_like(gradient), **options)


def _first_ones(places: Any, device: Any) -> torch.Tensor:
    return torch.arange(len(places), device=device)


_grad: Callable[..., Any] = torch.autograd.grad

RULE = Rule(
    code="GRD205",
    name="pieces-change-gradients",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("GRD203",),
    check=check,
    faults=(
        Fault(
            "gradient-from-above-lost",
            "the recomputation of a piece ignores the gradient that it is handed",
            _where(torch.autograd, "grad", _without_gradient_from_above),
        ),
        Fault(
            "tokens-of-the-first", "every piece reads the row's first tokens", _where(recompute, "moved", _first_ones)
        ),
    ),
)
