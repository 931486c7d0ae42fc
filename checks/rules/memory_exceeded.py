"""The run fits into the memory of the GPU that it would use.

What it does
------------
Computes the run's bytes from the real model's shapes (base by its loading plan, hypernetwork with gradients and
optimizer, activations, logits at labels) and compares them with the free memory of the GPU.

Why it matters
--------------
Running out of memory comes late: when the weights are dequantized, when a second copy of the base is loaded as encoder,
or at the first long row. By then the download and the load have been paid for.

How it is detected
------------------
The largest of the sums while loading and at the peak of a step must be below the free memory. Weights are exact,
activations an estimate within a factor of about 1.5. Without a GPU the figures are given and the check is skipped.

How to fix
----------
Keep the experts packed (`expert_weights: packed`), lower `max_packed_inp_len` and `max_packed_ctx_len`, set
`gradient_checkpointing: true`, or take a larger GPU.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.trained_values import trained_values
from d2l.base.memory import memory_plan

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "keep expert_weights: packed, lower the packed lengths, set gradient_checkpointing: true, or take a larger GPU"


def check(subject: "Subject") -> Result:
    """Compare the bytes needed with the bytes free."""
    trained, kept = trained_values(subject)
    memory = memory_plan(
        subject.config, subject.base_config, subject.plan, hypernet_parameters=trained, optimizer_values=kept
    )
    needed = max(memory.loading, memory.peak)
    figures = {"loading": memory.loading, "peak": memory.peak, "steady": memory.steady}
    sums = ", ".join(f"{name} {amount / 1e9:.1f} GB" for name, amount in figures.items())
    free = subject.implementation.free_memory()
    if free is None:
        return Skip(f"no GPU here; computed for {subject.plan.dtype.value}: {sums}")
    evidence: dict[str, Any] = figures | {"free": free} | {part.name: part.peak for part in memory.components}
    if needed > free:
        return Fail(
            message="the run does not fit into memory",
            expected=f"at most {free / 1e9:.1f} GB",
            actual=sums,
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"{sums}; free {free / 1e9:.1f} GB", evidence)


RULE = Rule(
    code="MEM401",
    name="memory-exceeded",
    stage="device",
    severity="error",
    sources=("hardware", "failure mode 17", "failure mode 18"),
    requires=("ATT101", "TGT101", "HYP201"),
    check=check,
    faults=(Fault("small-gpu", "a GPU with a thousand bytes free", override(free_memory=lambda healthy: 1000)),),
)
