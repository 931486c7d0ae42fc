"""The attention implementation can train this model: it has its terms, its masks and a backward for them.

What it does
------------
Compares the planned attention implementation with what the model needs: packed masks, and learnable sinks where it has
them. Whether documents are in fact kept apart is measured by ATT201.

Why it matters
--------------
GPT-OSS adds a learnable sink to every softmax. No flash-attention kernel has a backward for it, SDPA has no term for it,
and a request for flash attention is rewritten to the inference kernel `kernels-community/vllm-flash-attn3`, which gives
NaN on packed rows with positions that restart. Flash kernels also take no masks, so packed documents cannot be kept
apart by them here.

How it is detected
------------------
Allowed are `eager` and `per_document`, which is eager one document at a time; `sdpa` for models without sinks that
support it.

How to fix
----------
Set `attn_implementation: auto`, or `per_document` where packed rows of many documents are long.
"""

from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the planned implementation with those that can train this model."""
    from checks.subject import changed
    from d2l.base.attention import PER_DOCUMENT
    from d2l.base.load import plan_load
    from d2l.base.masks import attention_layout

    choice = subject.plan.attention
    able = {
        "eager",
        PER_DOCUMENT,
        plan_load(changed(subject.config, attn_implementation="auto"), subject.base_config).attention.value,
    }
    layout = attention_layout(subject.base_config)
    evidence = {
        "attention": choice.value,
        "reason": choice.reason,
        "layer_types": list(layout.kinds),
        "window": layout.window,
    }
    if choice.value not in able:
        return Fail(
            message=f"{choice.value} cannot train {subject.base_config.model_type} on packed rows",
            expected=" or ".join(sorted(able)),
            actual=f"{choice.value} ({choice.reason})",
            remedy="set attn_implementation: auto",
            evidence=evidence,
            settings={"attn_implementation": "auto"},
        )
    return Pass(f"{choice.value}: {choice.reason}", evidence)


RULE = Rule(
    code="ATT101",
    name="attention-without-backward",
    stage="static",
    severity="error",
    sources=("fix 2", "failure mode F2", "failure mode 10", "Dao-AILab/flash-attention#1797"),
    check=check,
    faults=(
        Fault(
            "flash-attention",
            "flash_attention_2, rewritten to an inference kernel",
            configure(attn_implementation="flash_attention_2"),
        ),
        Fault(
            "hub-kernel",
            "the kernel that GPT-OSS is served with",
            configure(attn_implementation="kernels-community/vllm-flash-attn3"),
        ),
    ),
)
