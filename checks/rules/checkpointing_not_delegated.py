"""Gradient checkpointing reaches the base's layers: they are recomputed in the backward pass.

What it does
------------
Switches the run's checkpointing on for the tiny twin and counts how often each target Linear runs in one forward and
backward pass.

Why it matters
--------------
A Doc-to-LoRA model is a plain module around a `PreTrainedModel`. Where the switch is not handed on, a trainer fails with
`AttributeError`, or nothing happens; and `eval()` on the frozen base switches checkpointing off without a word. The run
then needs several times the activation memory that was planned.

How it is detected
------------------
Every target Linear must run at least twice: once in the forward pass, once in the recomputation.

How to fix
----------
Hand `gradient_checkpointing_enable` on to the base, and call `train()` on it.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.probes import alone, gradients, probe_rows
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import Implementation, Model

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Count the runs of every target Linear in one forward and backward pass."""
    if not subject.config.gradient_checkpointing:
        return Inapplicable("gradient_checkpointing is off in the configuration")
    model: Any = subject.twin()
    model.train()
    model.gradient_checkpointing_enable(subject.config.gradient_checkpointing_kwargs)
    runs: Counter[str] = Counter()
    linears = {
        f"{name} of layer {layer}": linear
        for name, found in subject.implementation.targets(model.base, subject.config.target_modules).items()
        for layer, linear in enumerate(found)
    }
    batch = alone(probe_rows(subject))[0]
    lora = model.lora(batch)
    hooks = [
        linear.register_forward_hook(lambda *_, place=place: runs.update([place])) for place, linear in linears.items()
    ]
    try:
        gradients(model, model.logits(batch, lora).float().logsumexp(-1).sum())
    finally:
        for hook in hooks:
            hook.remove()
    once = [place for place in linears if runs[place] < 2]
    if once:
        return Fail(
            message="gradient checkpointing does not reach the base's layers",
            expected="every target runs twice: forward and recomputation",
            actual=f"{len(once)} of {len(linears)} ran {runs[once[0]]} time(s), {once[0]} first",
            remedy="hand gradient_checkpointing_enable on to the base and call train() on it",
            evidence={"runs": dict(runs)},
        )
    return Pass(f"all {len(linears)} targets are recomputed in the backward pass", {"runs": dict(runs)})


def _not_handed_on(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let the wrapper take the call and do nothing."""
    model: Any = healthy.build(base, config)
    model.gradient_checkpointing_enable = lambda kwargs: None
    return model


def _base_in_eval(healthy: Implementation, base: Any, config: Any) -> Model:
    """Keep the frozen base in eval mode, where transformers does not checkpoint."""
    model: Any = healthy.build(base, config)
    base.eval()
    base.train = lambda mode=True: base
    return model


RULE = Rule(
    code="GRD202",
    name="checkpointing-not-delegated",
    stage="twin",
    severity="error",
    sources=("fix 7", "failure mode F7"),
    requires=("GRD201",),
    check=check,
    faults=(
        Fault("not-handed-on", "gradient_checkpointing_enable does nothing", override(build=_not_handed_on)),
        Fault("base-in-eval", "the frozen base is kept in eval mode", override(build=_base_in_eval)),
    ),
)
