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
The plan's experts must be `packed` (kept in MXFP4, with a backward to their inputs) or `dequantize`, where the config's
`quantization_config` names MXFP4. QNT202 measures it.

How to fix
----------
Set `expert_weights: packed` (13 GB for gpt-oss-20b) or `expert_weights: dequantize` (42 GB).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.faults import configure, override
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from d2l.base.load_plan import Choice

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look at how the plan holds the experts."""
    experts, quantization = subject.plan.experts, subject.plan.quantization
    stored = getattr(subject.base_config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if str(getattr(method, "value", method)) == "mxfp4" and experts.value == "dense":
        return Fail(
            message="an MXFP4 checkpoint would be read as if its experts were whole matrices",
            expected="experts held as packed or dequantize: quantization_config names mxfp4",
            actual=f"{experts.value} ({experts.reason})",
            remedy="read quant_method of the config's quantization_config when the loading is planned",
        )
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
    if experts.value == "dequantize":
        return Pass(f"experts are held as dequantize: {experts.reason}", evidence)
    products = subject.plan.expert_products
    evidence |= {"products": products.value, "why": products.reason}
    return Pass(f"experts are held as packed: {experts.reason}; {products.reason}", evidence)


def _not_recognised(healthy: Implementation, config: Any, base_config: Any) -> Any:
    """Plan as if the checkpoint held no MXFP4."""
    return replace(healthy.plan(config, base_config), experts=Choice("dense", "the checkpoint holds no MXFP4"))


def _without_mxfp4(subject: "Subject") -> str:
    return "the checkpoint is not in MXFP4" if subject.plan.experts.value == "dense" else ""


RULE = Rule(
    code="QNT101",
    name="experts-without-backward",
    stage="static",
    severity="error",
    sources=("fix 1", "failure mode F1"),
    check=check,
    faults=(
        Fault("native-kernels", "transformers' own MXFP4 kernels", configure(expert_weights="native")),
        Fault(
            "not-recognised",
            "an MXFP4 checkpoint is planned as one of whole matrices",
            override(plan=_not_recognised, unless=_without_mxfp4),
        ),
    ),
)
