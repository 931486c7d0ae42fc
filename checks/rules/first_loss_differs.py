"""Steps with the real weights begin at the base's own loss, are finite, and reach every parameter of the hypernetwork.

What it does
------------
Loads the base as the run would, onto the run's device, and takes three optimizer steps on the largest packed row of the
run's own data, with the run's own hypernetwork, precision, recomputation and learning rate.

Why it matters
--------------
Twins are tiny and in float32. A run on the real weights computes in another precision, with other kernels, and on real
rows; what breaks there alone (a loss that overflows in bfloat16, gradients that round to zero, a LoRA that is not zero at the
start) is seen after the loading has been paid for, or never.

How it is detected
------------------
A new hypernetwork makes a LoRA of zeros, so that the first loss is the base's own: the cross-entropy (or the divergence
from the teacher) of its logits without a LoRA, reckoned in float64. In float32 the two agree to 1e-4 of it, in bfloat16 to
2e-2. No step may be refused, and in the third one every parameter has a gradient. Only one micro-batch is taken for each
step; on a CPU only where a step has at most 2e12 operations. Random bases, weights that are not on this machine, and runs
without data are not judged.

How to fix
----------
Compare with `dtype: float32`, then with `attn_implementation: per_document` and `expert_weights: dequantize`: what makes
the difference go away is its cause.
"""

from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.on_device import STEPS, DeviceSteps, device_steps, nothing_to_train

if TYPE_CHECKING:
    from checks.subject import Subject

IN_FLOAT32, ROUNDED = 1e-4, 2e-2  # of the loss
REMEDY = (
    "compare with dtype: float32, attn_implementation: per_document and expert_weights: dequantize: what makes the "
    "difference go away is its cause"
)


def check(subject: "Subject") -> Result:
    """Take the steps, and compare the first loss with the base's own."""
    steps = device_steps(subject)
    if not isinstance(steps, DeviceSteps):
        return steps
    tolerance = IN_FLOAT32 if subject.plan.torch_dtype == torch.float32 else ROUNDED
    evidence = {"losses": steps.losses, "expected": steps.expected, "tokens": steps.tokens}
    first = steps.losses[0]
    if steps.expected is not None and not abs(first - steps.expected) <= tolerance * abs(steps.expected):
        return Fail(
            message="the first loss is not the base's own, though the LoRA is zero",
            expected=f"{steps.expected:.5g} within {tolerance:g} of it",
            actual=f"{first:.5g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    if steps.unreached:
        return Fail(
            message=f"no gradient reaches {len(steps.unreached)} parameters of the hypernetwork",
            expected=f"a gradient for each in step {STEPS}",
            actual=f"none for {', '.join(steps.unreached[:5])}",
            remedy=REMEDY,
            evidence=evidence,
        )
    begun = "" if steps.expected is None else f", the first at the base's own loss {steps.expected:.4g}"
    return Pass(f"{STEPS} steps on {steps.tokens:,} tokens{begun}; every parameter has a gradient", evidence)


def _with_a_larger_head(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    model.base.get_output_embeddings().weight.data.mul_(1.1)
    return healthy.trainer(model, rows, config)


def _with_a_frozen_part(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    next(iter(model.hypernet.parameters())).requires_grad_(False)
    return healthy.trainer(model, rows, config)


def _with_a_spoilt_update(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    made: Any = healthy.trainer(model, rows, config)
    step = made.step

    def spoiling() -> Any:
        metrics = step()
        next(iter(model.hypernet.parameters())).data.fill_(torch.nan)
        return metrics

    made.step = spoiling
    return made


RULE = Rule(
    code="STP401",
    name="first-loss-differs",
    stage="device",
    severity="error",
    sources=("failure mode 40", "failure mode C9", "failure mode C13"),
    requires=("ATT101", "TGT101", "HYP201", "LBL101", "DAT301", "LBL301", "DAT302", "ATT401", "BAS401", "BAS402"),
    check=check,
    lasting=True,
    faults=(
        Fault(
            "larger-head",
            "a head that is a tenth larger than it was",
            override(nothing_to_train, trainer=_with_a_larger_head),
        ),
        Fault(
            "frozen-part",
            "a part of the hypernetwork that is frozen",
            override(nothing_to_train, trainer=_with_a_frozen_part),
        ),
        Fault(
            "spoilt-update",
            "an update that leaves NaN",
            override(nothing_to_train, trainer=_with_a_spoilt_update).in_trainer("step"),
        ),
    ),
)
