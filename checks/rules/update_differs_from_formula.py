"""The optimizer holds all of the hypernetwork and nothing else, and its updates are those of AdamW and Muon as configured.

What it does
------------
Observes a short run of the run's own trainer on a twin, and two steps with Muon, whatever the run uses, the second one in the
smallest pieces, as large matrices are stepped; betas, epsilon, weight decay and learning rates are the probe's. From the
gradients that the optimizer gets, every parameter's next value is computed by the formulas of AdamW and Muon.

Why it matters
--------------
Swapped betas, decay on scalers and biases, a `muon_learning_rate` that nothing reads, or a parameter that no optimizer holds:
the loss falls all the same, only slower, and to a worse place.

How it is detected
------------------
Every parameter must be updated once in every step, by the computed amount to 1e-5 of its largest entry. No parameter of the
base may be in an optimizer.

How to fix
----------
Give every parameter of the hypernetwork to the optimizer once: weight matrices with `weight_decay`, and with
`muon_learning_rate` where it is set; scalers, biases, norms and latent queries with `learning_rate` and without decay.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from checks.faults import override, override_step
from checks.implementation import Implementation
from checks.oracles import optimizer
from checks.result import Fail, NotOffered, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.observed import Observed, observed_step
from checks.training.short_run import PLAN, short_run
from checks.training.steps import light_config

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

EXACT = 1e-5
MUON = {
    "learning_rate": 1e-3,
    "muon_learning_rate": 2e-2,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,  # an update begins at the gradient, however it was added up
}
REMEDY = (
    "check betas, epsilon, the groups with and without weight decay, and the learning rate of each group; every parameter "
    "of the hypernetwork belongs to one group"
)


def check(subject: "Subject") -> Result:
    """Compare every update of a short run, and of a few steps with Muon, with the formulas."""
    run = short_run(subject)
    names = [name for name, _ in run.trainer.model.hypernet.named_parameters()]
    if finding := _census(run.steps, names):
        return finding
    config = light_config(subject, **{**PLAN, **MUON})
    plans = {"AdamW and Muon" if subject.config.muon_learning_rate else "AdamW": (run.steps, run.config)}
    try:
        trainer = subject.implementation.trainer(run.trainer.model, run.rows, config)
        plans["Muon"] = [observed_step(trainer), _step_in_pieces(subject, trainer)], config
    except NotOffered:  # another implementation may have AdamW alone
        if subject.config.muon_learning_rate is not None:
            raise
    beside = "" if subject.config.muon_learning_rate else ", tried beside the run's AdamW, at one learning rate"
    evidence = {}
    for kind, (steps, plan) in plans.items():
        error, place = _worst_update(steps, plan)
        evidence[kind] = error
        if not error <= EXACT:
            return Fail(
                message=f"an update is not that of {kind} as configured",
                expected=f"updates within {EXACT:g} of the largest entry of each parameter's",
                actual=f"{error:.2g} in {place}{beside if kind == 'Muon' else ''}",
                remedy=REMEDY,
                evidence=evidence,
            )
    counts = " and ".join(f"{len(steps)} of {kind}" for kind, (steps, _) in plans.items())
    return Pass(
        f"{len(names)} parameters: updates, {counts}, follow the formulas to {max(evidence.values()):.1g}",
        evidence,
    )


def _step_in_pieces(subject: "Subject", trainer: "Stepper") -> Observed:
    """Take a step that has the last one's momentum, in the smallest pieces where an implementation has any."""
    try:
        pieces = subject.implementation.in_pieces()
    except NotOffered:
        pieces = nullcontext()
    with pieces:
        return observed_step(trainer)


def _census(steps: Sequence[Observed], names: Sequence[str]) -> Result | None:
    """Look for parameters that are missing, updated twice, or not the hypernetwork's."""
    for number, step in enumerate(steps, start=1):
        missing = [name for name in names if name not in step.updates]
        twice = [name for name, update in step.updates.items() if update.times != 1]
        wrong = (
            (missing, f"{len(missing)} of {len(names)} parameters are in no optimizer"),
            (twice, f"{len(twice)} of {len(names)} parameters are updated several times"),
            (step.strangers, f"{len(step.strangers)} parameters that are not the hypernetwork's are in the optimizer"),
        )
        for found, message in wrong:
            if found:
                return Fail(
                    message=message,
                    expected="each parameter of the hypernetwork updated once in every step, and nothing else",
                    actual=f"in step {number}: {found[0]}, first of {len(found)}",
                    remedy=REMEDY,
                    evidence={"step": number, "parameters": found},
                )
    return None


def _worst_update(steps: Sequence[Observed], config: "RunConfig") -> tuple[float, str]:
    """Return the largest error of any update over its largest entry, and where it is."""
    worst, place = 0.0, ""
    states: dict[str, Any] = {}
    for number, step in enumerate(steps, start=1):
        for name, update in step.updates.items():
            decays = optimizer.decays(name, update.before.shape)
            decay = config.weight_decay if decays else 0.0
            if config.muon_learning_rate is not None and decays:
                expected, states[name] = optimizer.muon(
                    update.before,
                    update.gradient,
                    states.get(name),
                    lr=config.muon_learning_rate,
                    weight_decay=decay,
                )
            else:
                expected, states[name] = optimizer.adamw(
                    update.before,
                    update.gradient,
                    states.get(name),
                    number,
                    # of this step, where a schedule changes it: OPT203 compares it with the formula
                    lr=config.learning_rate if config.muon_learning_rate else update.options["lr"],
                    betas=(config.adam_beta1, config.adam_beta2),
                    eps=config.adam_epsilon,
                    weight_decay=decay,
                )
            size = float((expected - update.before).abs().max())
            error = float((update.after - expected).abs().max()) / max(size, 1e-9)
            if not error <= worst:
                worst, place = error if error == error else float("inf"), f"{name}, step {number}"
    return worst, place


def _betas_swapped(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    return healthy.trainer(model, rows, changed(config, adam_beta1=config.adam_beta2, adam_beta2=config.adam_beta1))


def _one_rate(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Step the matrices at the learning rate of the rest."""
    if config.muon_learning_rate is not None:
        config = changed(config, muon_learning_rate=config.learning_rate)
    return healthy.trainer(model, rows, config)


def _decay_on_all(step: Any, trainer: Any) -> Any:
    """Let every group of the optimizer decay, just before it steps."""

    def change(stepping: torch.optim.Optimizer, *_: Any) -> None:
        decay = max(group["weight_decay"] for group in stepping.param_groups)
        for group in stepping.param_groups:
            group["weight_decay"] = decay

    hook = register_optimizer_step_pre_hook(change)
    try:
        return step()
    finally:
        hook.remove()


@contextmanager
def _last_piece_lost(healthy: Implementation) -> Iterator[None]:
    """Leave the last matrix of an optimizer as it was."""
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def keep(stepping: torch.optim.Optimizer, *_: Any) -> None:
        matrix = [it for group in stepping.param_groups for it in group["params"] if it.ndim > 1][-1]
        kept.append((matrix, matrix.detach().clone()))

    def put_back(*_: Any) -> None:
        matrix, value = kept.pop()
        matrix.data.copy_(value)

    hooks = register_optimizer_step_pre_hook(keep), register_optimizer_step_post_hook(put_back)
    try:
        with healthy.in_pieces():
            yield
    finally:
        for hook in hooks:
            hook.remove()


RULE = Rule(
    code="OPT201",
    name="update-differs-from-formula",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode C7"),
    requires=("STP202",),
    check=check,
    faults=(
        Fault("betas-swapped", "beta1 and beta2 are exchanged", override(trainer=_betas_swapped).in_trainer("step")),
        Fault("decay-on-all", "scalers and biases decay too", override_step(_decay_on_all)),
        Fault("one-rate", "muon_learning_rate is ignored", override(trainer=_one_rate).in_trainer("step")),
        Fault("last-piece-lost", "in pieces, the last matrix is not stepped", override(in_pieces=_last_piece_lost)),
    ),
)
