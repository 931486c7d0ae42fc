"""The context encoder is not quantized a second time.

What it does
------------
Reads from the loading plan whether bitsandbytes is requested, and over which checkpoint.

Why it matters
--------------
`quantize_ctx_encoder: true` over an MXFP4 checkpoint ends in `ValueError: The model is quantized with Mxfp4Config but
you are passing a BitsAndBytesConfig`, after minutes of downloading and loading. Skipping it silently, as the documented
fix does, changes the memory from four bits to bf16: four times what was planned.

How it is detected
------------------
The plan's quantization must be the checkpoint's own. Here encoder and base are one copy, so there is no second one to
quantize either.

How to fix
----------
Set `quantize_ctx_encoder: false`. With `expert_weights: packed` the experts stay in four bits anyway.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look at the quantization that the plan carries out."""
    choice = subject.plan.quantization
    evidence = {"quantization": choice.value, "reason": choice.reason}
    if choice.value == "bitsandbytes":
        return Fail(
            message="bitsandbytes is requested on top of the base's own weights",
            expected="the checkpoint's own quantization, once",
            actual=choice.reason,
            remedy="set quantize_ctx_encoder: false",
            evidence=evidence,
            settings={"quantize_ctx_encoder": False},
        )
    return Pass(f"quantization: {choice.value} ({choice.reason})", evidence)


RULE = Rule(
    code="QNT102",
    name="quantized-twice",
    stage="static",
    severity="error",
    sources=("fix 3", "failure mode F3", "failure mode 18"),
    check=check,
    faults=(Fault("bitsandbytes", "quantize_ctx_encoder: true", configure(quantize_ctx_encoder=True)),),
)
