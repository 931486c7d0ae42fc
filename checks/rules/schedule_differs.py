"""The learning rate of every optimizer step is the one that the schedule's formula gives.

What it does
------------
Reads the learning rates that the optimizer of a short run on a twin uses, with a warm-up, a line to zero and two micro-batches
a step, and requests those of all four schedules over a short plan, and of the run's own plan at its start, in and after its
warm-up, in its middle and at its end.

Why it matters
--------------
A schedule that is stepped once for every micro-batch ends early; one that is never stepped stays in its warm-up, at zero. Both
look like a model that learns slowly.

How it is detected
------------------
Every rate must agree with the formula to 1e-6 of the peak.

How to fix
----------
Step the schedule once after every optimizer step, over `max_steps` optimizer steps, and hand it warmup_steps, min_lr and
decay_steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles.schedule import KINDS, learning_rate
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.short_run import short_run
from checks.training.steps import light_config

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

EXACT = 1e-6
PLAN: dict[str, Any] = {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_steps": 3, "decay_steps": 4, "max_steps": 12}


def check(subject: "Subject") -> Result:
    """Compare the rates of a short run, of all schedules over a short plan, and of the run's own plan."""
    run = short_run(subject)
    seen = [{update.options["lr"] for update in step.updates.values()} for step in run.steps]
    used = [rates.pop() if len(rates) == 1 else float("nan") for rates in seen]
    plans: list[tuple[str, RunConfig, Sequence[int], Sequence[float]]] = [
        ("of the optimizer in a short run", run.config, range(len(used)), used)
    ]
    for kind in KINDS:
        config = light_config(subject, **PLAN, lr_scheduler_type=kind)
        whole = range(config.max_steps)
        plans.append((f"of {kind}", config, whole, subject.implementation.learning_rates(config, whole)))
    own = subject.config
    points: Sequence[int] = _points(own)
    plans.append(("of the run's own plan", own, points, subject.implementation.learning_rates(own, points)))
    worst = 0.0
    for what, config, steps, rates in plans:
        for step, actual in zip(steps, rates, strict=True):
            expected = _formula(config, step)
            error = abs(actual - expected) / config.learning_rate
            if not error <= EXACT:
                return Fail(
                    message=f"the learning rate {what} is not that of the schedule",
                    expected=f"{expected:.6g} in step {step + 1} of {config.max_steps} ({config.lr_scheduler_type})",
                    actual=f"{actual:.6g}",
                    remedy="step the schedule once after every optimizer step, over max_steps optimizer steps",
                    evidence={"what": what, "step": step + 1, "expected": expected, "actual": actual},
                )
            worst = max(worst, error)
    return Pass(
        f"{len(used)} steps of a short run, {len(KINDS)} schedules, and the run's own at {len(points)} of its "
        f"{own.max_steps:,} steps agree with the formulas",
        {"relative_error": worst, "run": dict(zip(points, plans[-1][3], strict=True))},
    )


def _points(config: "RunConfig") -> list[int]:
    """Return telling steps of a plan, counted from 0: start, warm-up, middle, the beginning of the end, last."""
    last = config.max_steps - 1
    warm, end = config.warmup_steps, config.max_steps - config.decay_steps
    points = (0, 1, warm // 2, warm - 1, warm, warm + 1, (warm + last) // 2, last // 2, end, (end + last) // 2, last)
    return sorted({point for point in points if 0 <= point <= last})


def _formula(config: "RunConfig", step: int) -> float:
    return learning_rate(
        step,
        config.lr_scheduler_type,
        config.learning_rate,
        config.warmup_steps,
        config.max_steps,
        config.min_lr,
        config.decay_steps,
    )


def _stepped_per_micro_batch(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Plan for micro-batches: the schedule runs through in a fraction of the steps."""
    fewer = max(1, config.max_steps // config.gradient_accumulation_steps)
    sooner = config.warmup_steps // config.gradient_accumulation_steps
    return healthy.trainer(model, rows, changed(config, max_steps=fewer, warmup_steps=sooner))


def _without_minimum(healthy: Implementation, config: "RunConfig", steps: Sequence[int]) -> Sequence[float]:
    """Let the cosine end at zero."""
    return healthy.learning_rates(changed(config, min_lr=0.0), steps)


RULE = Rule(
    code="OPT203",
    name="schedule-differs",
    stage="twin",
    severity="error",
    sources=("failure mode C8",),
    requires=("STP202", "OPT201"),
    check=check,
    faults=(
        Fault(
            "stepped-per-micro-batch",
            "the schedule is stepped for every micro-batch",
            override(trainer=_stepped_per_micro_batch).in_trainer("step"),
        ),
        Fault("minimum-ignored", "min_lr is ignored", override(learning_rates=_without_minimum)),
    ),
)
