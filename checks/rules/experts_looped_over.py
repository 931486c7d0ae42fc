"""The GPU multiplies all packed experts of a layer in one kernel.

What it does
------------
Reads from the loading plan how the GPU that is here would compute experts that stay in MXFP4.

Why it matters
--------------
torch multiplies the experts of a layer at once (`grouped_mm`) on SM 90 and SM 100 only. On other cards (SM 80, 86, 89, 120)
it copies the offsets to the host and loops over the experts, and d2l takes them one by one. The results are the same, and a
step takes several times as long: ten times was reported elsewhere.

How it is detected
------------------
Packed experts on a CUDA device must be planned as `grouped`. A warning: such a run is right, and slow. Without a GPU there is
nothing to look at; a card that is only named by its memory is taken for one of SM 90.

How to fix
----------
Take a GPU of SM 90 or 100 (H100, H200, B200), with `dtype: bfloat16` or `auto`; or, where four times the memory is there, set
`expert_weights: dequantize`. `d2l plan --gpu` reckons both for a card.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look at the plan's products of packed experts."""
    plan = subject.plan
    products = plan.expert_products
    if plan.experts.value != "packed":
        return Inapplicable(f"no packed experts: {plan.experts.value} ({plan.experts.reason})")
    if not plan.device.value.startswith("cuda"):
        return Pass(f"no GPU here whose kernels could be judged: {products.reason}")
    evidence = {"device": plan.device.value, "dtype": plan.dtype.value, "products": products.value}
    if products.value != "grouped":
        return Fail(
            message="the experts of a layer are multiplied one by one on this GPU, several times slower",
            expected="grouped: all experts of a layer in one kernel",
            actual=f"{products.value}: {products.reason}",
            remedy="take a GPU of SM 90 or 100 and dtype: bfloat16, or expert_weights: dequantize where the memory is there",
            evidence=evidence,
        )
    return Pass(products.reason, evidence)


def _on_a_card(value: str, reason: str) -> Any:
    """Plan packed experts for a GPU that multiplies them so."""

    def plan(healthy: Implementation, config: Any, base_config: Any) -> Any:
        made = healthy.plan(config, base_config)
        products = replace(made.expert_products, value=value, reason=reason)
        return replace(made, device=replace(made.device, value="cuda"), expert_products=products)

    return override(
        unless=lambda subject: "" if subject.plan.experts.value == "packed" else "there are no packed experts",
        plan=plan,
    )


RULE = Rule(
    code="QNT103",
    name="experts-looped-over",
    stage="static",
    severity="warning",
    sources=("failure mode C10",),
    requires=("QNT101",),
    check=check,
    faults=(
        Fault(
            "card-without-the-kernel",
            "packed experts on a card of SM 80",
            _on_a_card("one_by_one", "CUDA SM 80 has no kernel for all experts of a layer at once"),
        ),
    ),
)
