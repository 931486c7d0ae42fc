"""The schedule unfolds within the run: its peak is reached, and it ends as its name promises.

What it does
------------
Computes the learning rate of every step of the run's plan from `lr_scheduler_type`, `warmup_steps`, `decay_steps`,
`max_steps` and `min_lr`.

Why it matters
--------------
A warm-up as long as the run trains at a fraction of the rate that is configured; the loss falls slowly, and the model
looks weak. A `min_lr` above the peak makes the cosine rise. `warmup_stable_decay` with `decay_steps: 0`, the default,
never decays, and with more decay than there are steps it starts below its peak.

How it is detected
------------------
The largest rate of the plan must be the peak; under a cosine, the last must not be above it; under
`warmup_stable_decay`, there must be a decay, behind the warm-up. A warning: such a run works, but hardly as meant.

How to fix
----------
Choose `warmup_steps` (and `decay_steps`) well below `max_steps`, and `min_lr` below `learning_rate`.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.oracles import schedule
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

SHOWN = (0.0, 0.1, 0.5, 1.0)  # parts of the run for which the report names the rate


def check(subject: "Subject") -> Result:
    """Compute the plan's rates, and compare them with what the settings promise."""
    config = subject.config
    turns = {0, config.warmup_steps, config.max_steps - config.decay_steps, *(_step(config, part) for part in SHOWN)}
    rates = {step: _rate(config, step) for step in sorted(turns) if 0 <= step < config.max_steps}
    shown = ", ".join(f"{rates[_step(config, part)]:.2g} at {part:.0%}" for part in SHOWN)
    evidence = {"rates by step": {str(step): rate for step, rate in rates.items()}}
    if problem := _problem(config, max(rates.values())):
        message, expected, remedy = problem
        return Fail(message=message, expected=expected, actual=shown, remedy=remedy, evidence=evidence)
    return Pass(f"learning rate: {shown}", evidence)


def _step(config: "RunConfig", part: float) -> int:
    return round(part * (config.max_steps - 1))


def _rate(config: "RunConfig", step: int) -> float:
    return schedule.learning_rate(
        step,
        config.lr_scheduler_type,
        config.learning_rate,
        config.warmup_steps,
        config.max_steps,
        config.min_lr,
        config.decay_steps,
    )


def _problem(config: "RunConfig", largest: float) -> tuple[str, str, str] | None:
    """Return message, expectation and remedy of the first thing that is odd."""
    peak, steps = config.learning_rate, config.max_steps
    if config.lr_scheduler_type == "cosine_with_min_lr" and config.min_lr > peak:
        return "the learning rate rises to the end", f"min_lr at most {peak:g}", "lower min_lr below learning_rate"
    if config.lr_scheduler_type == "warmup_stable_decay":
        if config.decay_steps == 0:
            return "the schedule has no decay", "decay_steps above 0", "set decay_steps, or constant_with_warmup"
        if config.warmup_steps + config.decay_steps > steps:
            total = f"warmup_steps + decay_steps at most max_steps, {steps}"
            return "warm-up and decay overlap", total, "lower decay_steps or warmup_steps, or raise max_steps"
    if steps > 1 and largest < 0.99 * peak:
        return (
            f"the learning rate reaches {largest:.2g} of {peak:.2g}",
            f"warmup_steps below max_steps, {steps}",
            "lower warmup_steps, or raise max_steps",
        )
    return None


RULE = Rule(
    code="OPT101",
    name="schedule-cut-short",
    stage="static",
    severity="warning",
    sources=("failure mode C8",),
    check=check,
    faults=(
        Fault("all-warm-up", "a warm-up longer than the run", configure(warmup_steps=50, max_steps=20)),
        Fault(
            "minimum-above-peak",
            "a minimum above the peak",
            configure(lr_scheduler_type="cosine_with_min_lr", learning_rate=1e-5, min_lr=1e-4),
        ),
        Fault(
            "no-decay",
            "warmup_stable_decay with the default decay_steps",
            configure(lr_scheduler_type="warmup_stable_decay", decay_steps=0, warmup_steps=0),
        ),
    ),
)
