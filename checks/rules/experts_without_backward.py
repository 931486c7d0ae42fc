"""The run loads experts that gradients can pass through.

What it does
------------
Reads from the loading plan how the experts of an MXFP4 checkpoint would be held.

Why it matters
--------------
MXFP4 as transformers runs it is a format for inference: its kernels have no backward. Loaded so, no gradient passes
through any expert; the residual stream still carries some, so `grad_norm` is above zero, the loss falls a little, and
the hypernetwork learns from a gradient that points elsewhere (cosine to the true one: -0.1 to 0.7 per layer).

How it is detected
------------------
The plan's experts must be `packed` (kept in MXFP4, with a backward to their inputs) or `dequantize`. QNT202 measures it.

How to fix
----------
Set `expert_weights: packed` (13 GB for gpt-oss-20b) or `expert_weights: dequantize` (42 GB).
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look at how the plan holds the experts."""
    experts, quantization = subject.plan.experts, subject.plan.quantization
    if experts.value == "dense":
        return Inapplicable(f"{experts.reason}: there are no experts to hold in MXFP4")
    evidence = {"experts": experts.value, "reason": experts.reason, "quantization": quantization.value}
    if experts.value not in ("packed", "dequantize"):
        return Fail(
            message="gradients would not pass through the experts",
            expected="experts held as packed or dequantize",
            actual=f"{experts.value} ({experts.reason})",
            remedy="set expert_weights: packed, or dequantize where there is memory for it",
            evidence=evidence,
            settings={"expert_weights": "auto"},
        )
    return Pass(f"experts are held as {experts.value}: {experts.reason}", evidence)


RULE = Rule(
    code="QNT101",
    name="experts-without-backward",
    stage="static",
    severity="error",
    sources=("fix 1", "failure mode F1"),
    check=check,
    faults=(Fault("native-kernels", "transformers' own MXFP4 kernels", configure(expert_weights="native")),),
)
