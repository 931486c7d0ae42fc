"""A step that would spoil the weights or teach nothing is refused, with nothing changed.

What it does
------------
Requests steps of the run's own trainer on a twin, with the run's losses and optimizer: one over rows without any supervised
token, one with an infinite loss and finite gradients, ones with NaN and with infinity in a gradient and a finite loss, and one
behind an update that left an infinite moment in the optimizer, where the trainer has a `require_sound_state`.

Why it matters
--------------
One NaN in a gradient turns every weight to NaN in the step that follows. Trainers that log NaN as 0.0, or compare it
with a threshold (`nan > t` is false), go on for hours and save checkpoints without a usable number in them. Where no token is
supervised the loss is a quiet 0.0, and weight decay alone moves the weights. A moment that has overflowed spoils its weights in
the next step, or keeps them where they are for good.

How it is detected
------------------
The trainer must raise before the optimizer runs, and no weight may change.

How to fix
----------
Before every `optimizer.step()`, require a finite loss, a finite gradient norm, finite moments and a supervised token, over all
ranks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from checks.faults import override_step
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.steps import guarded_config, hypernet_values, light_model, loss_rows
from d2l.errors import NonFiniteError

if TYPE_CHECKING:
    from checks.subject import Subject

GUARD = "require a supervised token, a finite loss and a finite gradient norm before every optimizer.step()"
INFINITE = "whose loss is infinite"


def check(subject: "Subject") -> Result:
    """Request steps that have to be refused."""
    config = changed(guarded_config(subject), gradient_checkpointing=False)  # GRD201 compares the two
    model: Any = light_model(subject, config, dtype=torch.float32)
    rows = loss_rows(subject)
    trainer = subject.implementation.trainer(model, rows, config)
    evidence: dict[str, Any] = {}
    unlabelled = subject.implementation.trainer(model, [_without_labels(row) for row in rows], config)
    if finding := _refusal(unlabelled, "without a supervised token", evidence):
        return finding
    spoilt = {
        INFINITE: _infinite_loss(model, rows[0].queries[0]),
        "with NaN in a gradient": _spoilt_gradient(model, math.nan),
        "with an infinite gradient": _spoilt_gradient(model, math.inf),
    }
    for what, spoil in spoilt.items():
        with spoil:
            finding = _refusal(trainer, what, evidence)
        if finding:
            return finding
    looks = hasattr(trainer, "require_sound_state")  # not every trainer promises to look at its moments
    spoilt_moment = looks and _spoil_moment(trainer)
    if spoilt_moment and (finding := _refusal(trainer, "with an infinite moment", evidence)):
        return finding
    parts = "a loss, gradients or moments" if spoilt_moment else "a loss or gradients"
    return Pass(f"steps without labels, and with {parts} that are not finite, are refused", evidence)


def _spoil_moment(trainer: Any) -> bool:
    """Take a sound step, then make a moment of an optimizer infinite; return whether there is one."""
    seen: list[Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    try:
        trainer.step()
    finally:
        hook.remove()
    for state in (state for optimizer in seen for state in optimizer.state.values()):
        for value in state.values():
            if torch.is_tensor(value) and value.is_floating_point() and value.dim():
                value.view(-1)[0] = math.inf
                return True
    return False


def _without_labels(row: Any) -> Any:
    """Return a row none of whose tokens is supervised."""

    def bare(query: Any) -> Any:
        teacher = {} if query.logprobs_vals is None else {"logprobs_vals": (), "logprobs_indices": ()}
        return replace(query, labels=(-100,) * len(query.labels), **teacher)

    return replace(row, queries=tuple(map(bare, row.queries)))


@contextmanager
def _infinite_loss(model: Any, query: Any) -> Iterator[None]:
    """Exclude a label, and what its teacher names, from the logits: the loss is infinite, and its gradients are finite."""
    excluded = torch.tensor([query.input_ids[-1], *query.logprobs_indices[-1]])

    def exclude(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, excluded, -math.inf)

    hook = model.base.get_output_embeddings().register_forward_hook(exclude)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _spoilt_gradient(model: Any, value: float) -> Iterator[None]:
    """Put a value into every place of the gradient of the first parameter; the loss stays finite."""
    first = next(iter(model.hypernet.parameters()))
    hook = first.register_hook(lambda gradient: torch.full_like(gradient, value))
    try:
        yield
    finally:
        hook.remove()


def _refusal(trainer: Any, what: str, evidence: dict[str, Any]) -> Result | None:
    """Request a step that has to be refused; return what is wrong with the refusal."""
    before = hypernet_values(trainer.model)
    try:
        metrics = trainer.step()
    except Exception as error:  # an implementation has errors of its own
        evidence[f"a step {what}"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    else:
        if what == INFINITE and math.isfinite(getattr(metrics, "task_loss", math.nan)):
            return None  # a base that caps its logits makes a finite loss of them
        return Fail(
            message=f"a step {what} is taken",
            expected="an error before the step",
            actual="the step",
            remedy=GUARD,
            evidence=evidence,
        )
    changes = [name for name, value in hypernet_values(trainer.model).items() if not _same(value, before[name])]
    if changes:
        return Fail(
            message=f"a refused step {what} changed weights",
            expected="no change",
            actual=f"{changes[0]} changed",
            remedy=GUARD,
            evidence=evidence,
        )
    return None


def _same(value: torch.Tensor, before: torch.Tensor) -> bool:
    """Return whether two tensors are equal, NaN at the same places included."""
    return torch.equal(value.nan_to_num(0.0), before.nan_to_num(0.0)) and torch.equal(value.isnan(), before.isnan())


def _unguarded(step: Any, trainer: Any) -> Any:
    """Log a step without a number as zero."""
    try:
        return step()
    except NonFiniteError:
        return None


def _state_ignored(step: Any, trainer: Any) -> Any:
    """Go on from whatever an update has left."""
    try:
        return step()
    except NonFiniteError as error:
        if "after the update" in str(error):
            return None
        raise


def _too_late(step: Any, trainer: Any) -> Any:
    """Let the weights decay before a step is refused."""
    try:
        return step()
    except NonFiniteError:
        for parameter in trainer.model.hypernet.parameters():
            parameter.data.mul_(1 - 1e-3)
        raise


RULE = Rule(
    code="STP201",
    name="step-not-guarded",
    stage="twin",
    severity="error",
    sources=("failure mode 4", "failure mode 10", "failure mode C7"),
    requires=("LSS201",),
    check=check,
    faults=(
        Fault("no-guard", "a step without labels or numbers passes", override_step(_unguarded)),
        Fault("moments-not-looked-at", "a step begins from infinite moments", override_step(_state_ignored)),
        Fault("refused-too-late", "a refused step has changed weights", override_step(_too_late)),
    ),
)
