"""The attention implementation can train this model: it has its terms, its masks and a backward for them.

What it does
------------
Compares the planned attention implementation with what the model needs: packed masks, and learnable sinks where it has
them. Whether documents are in fact kept apart is measured by ATT201 on a twin and by ATT401 on the GPU.

Why it matters
--------------
GPT-OSS adds a learnable sink to every softmax. Flash-attention kernels before version 4 have no backward for it, SDPA has
no term for it, and a request for flash attention is rewritten to the inference kernel
`kernels-community/vllm-flash-attn3`, which gives NaN on packed rows with positions that restart. transformers' own
`flex_attention` rounds the log-sum-exp to bfloat16 before the sinks, compiles a graph for each kind of mask (most of a
first step's two minutes on an H100), and after eight of them runs uncompiled, with all scores, without an error.

How it is detected
------------------
Allowed are `eager`; `per_document`, which is eager one document at a time; `packed_flex`, which is d2l's own use of
PyTorch's `flex_attention`, with memory linear in the length; `sdpa` for models without sinks that support it; and
`flash_attention_4` where the package flash-attn-4 is installed, because ATT401 judges it on the GPU.

`auto` takes `sdpa` for models without sinks that support it. For the others it takes `packed_flex` on CUDA (SM 80 and
later, Triton, heads of 16 and more), else `eager`: on a CPU, where every implementation but `per_document` fills all scores.

How to fix
----------
Set `attn_implementation: auto`; on a CPU `per_document` where packed rows of many documents are long.
"""

from importlib import metadata
from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the planned implementation with those that can train this model."""
    from checks.subject import changed
    from d2l.base.attention import FLASH_4, PER_DOCUMENT
    from d2l.base.flex import PACKED_FLEX
    from d2l.base.load_plan import plan_load
    from d2l.base.masks import attention_layout

    choice = subject.plan.attention
    able = {
        "eager",
        PER_DOCUMENT,
        PACKED_FLEX,
        *([FLASH_4] if _flash_4_installed() else []),
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


def _flash_4_installed() -> bool:
    try:
        metadata.distribution("flash-attn-4")
    except metadata.PackageNotFoundError:
        return False
    return True


RULE = Rule(
    code="ATT101",
    name="attention-without-backward",
    stage="static",
    severity="error",
    sources=(
        "fix 2",
        "failure mode F2",
        "failure mode 10",
        "failure mode C30",
        "failure mode C31",
        "failure mode C44",
        "Dao-AILab/flash-attention#1797",
    ),
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
