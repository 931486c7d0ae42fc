"""The run's peak learning rate can work: it does not throw the weights away in the first steps.

What it does
------------
Where the run's peak, or that of Muon, is above what such runs use, takes eight steps at the peak on a twin in float32, with the
run's betas, weight decay and clipping, and follows the weights and the loss.

Why it matters
--------------
AdamW and Muon move every weight by about the learning rate in a step, whatever the gradient: at 1e6 the weights are noise after
the first step. The loss stays finite for a while, since the hypernetwork normalises what it makes, and nothing is learned. Where
the rate times `weight_decay` exceeds 2, decay alone makes the weights grow with every step.

How it is detected
------------------
Up to 1e-2 for AdamW and 5e-2 for Muon no step is taken. Above, it is an error where the weights or the loss are not finite within
eight steps, or the largest weight is a thousand times as large after two; a warning where it has doubled after eight, or the loss
has.

How to fix
----------
Lower `learning_rate` to 1e-5 to 2e-3 for AdamW, `muon_learning_rate` to 1e-3 to 5e-2. What learnt: 7e-4 and 5.6e-3 on a tiny
GPT-OSS (configs/needle_tiny.yaml), 1.5e-3 and 1.6e-2 on SmolLM2-135M (experiments/smollm2.md); the paper has 4e-5, without Muon.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import configure
from checks.result import Fail, Pass, Result, Warn
from checks.rule import Fault, Rule
from checks.training.steps import light_config, light_model, loss_rows

if TYPE_CHECKING:
    from checks.subject import Subject

ORDINARY = {"learning_rate": 1e-2, "muon_learning_rate": 5e-2}
OWN = (
    "muon_learning_rate",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
STEPS, FIRST = 8, 2
THROWN, SPOILT = 1e3, 2.0  # growth of the largest weight, after two steps and after eight


def check(subject: "Subject") -> Result:
    """Take a few steps at the peak where it is above the ordinary, and measure what becomes of the weights."""
    peaks = {name: getattr(subject.config, name) for name in ORDINARY if getattr(subject.config, name) is not None}
    high = {name: peak for name, peak in peaks.items() if peak > ORDINARY[name]}
    if not high:
        bounds = ", ".join(f"{name} {peak:g} is at most {ORDINARY[name]:g}" for name, peak in peaks.items())
        return Pass(f"ordinary: {bounds}", peaks)
    growth, losses, stopped = _follow(subject)
    evidence = {"peaks": peaks, "growth": growth, "losses": losses, "stopped": stopped}
    rates = " and ".join(f"{name} {peak:g}" for name, peak in high.items())
    remedy = "lower " + " and ".join(f"{name} to {ORDINARY[name]:g} or less" for name in high)
    early = growth[min(FIRST, len(growth)) - 1] if growth else math.inf
    if stopped or not early < THROWN:
        what = (
            f"step {len(growth) + 1} is not finite: {stopped}" if stopped else f"{early:.2g} times after {FIRST} steps"
        )
        return Fail(
            message=f"the learning rate cannot work: {rates} throws the weights away in the first steps",
            expected=f"finite steps, the largest weight below {THROWN:g} times its start",
            actual=what,
            remedy=remedy,
            evidence=evidence,
        )
    if growth[-1] >= SPOILT or losses[-1] >= SPOILT * losses[0]:
        return Warn(
            message=f"the learning rate is very high: {rates} spoils a twin in {STEPS} steps",
            expected=f"the largest weight and the loss below {SPOILT:g} times their start",
            actual=f"weight {growth[-1]:.2g} times, loss {losses[0]:.3g} → {losses[-1]:.3g}",
            remedy=remedy,
            evidence=evidence,
        )
    return Pass(
        f"{rates} is high, but {STEPS} steps leave the largest weight at {growth[-1]:.2g} times its start, "
        f"the loss {losses[0]:.3g} → {losses[-1]:.3g}",
        evidence,
    )


def _follow(subject: "Subject") -> tuple[list[float], list[float], str]:
    """Return, for every step, the growth of the largest weight and the loss, and what stopped the steps, if anything did."""
    config = light_config(subject, **{name: getattr(subject.config, name) for name in OWN})
    model: Any = light_model(subject, config, dtype=torch.float32)
    trainer = subject.implementation.trainer(model, loss_rows(subject), config)
    start = _largest(model)
    growth: list[float] = []
    losses: list[float] = []
    for _ in range(STEPS):
        try:
            loss = trainer.step().task_loss
        except Exception as error:  # an implementation has errors of its own for a step that is not finite
            return growth, losses, next(iter(str(error).splitlines()), type(error).__name__)
        if not (math.isfinite(loss) and math.isfinite(_largest(model))):
            return growth, losses, f"loss {loss}, largest weight {_largest(model)}"
        growth.append(_largest(model) / start)
        losses.append(loss)
    return growth, losses, ""


def _largest(model: Any) -> float:
    """Return the largest weight of the hypernetwork by size; NaN where one is NaN."""
    return float(torch.stack([parameter.detach().abs().max() for parameter in model.hypernet.parameters()]).max())


RULE = Rule(
    code="OPT204",
    name="learning-rate-too-high",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("STP202", "OPT201"),
    check=check,
    faults=(
        Fault("adamw-at-a-million", "learning_rate is 1e6", configure(learning_rate=1e6)),
        Fault("muon-at-a-million", "muon_learning_rate is 1e6", configure(muon_learning_rate=1e6)),
    ),
)
