"""A target Linear's own forward is honoured under the LoRA.

What it does
------------
Gives every target Linear of the tiny twin a `forward` of its own (twice the plain result), binds a LoRA, and compares
with a twin of plain Linears whose weights are twice as large.

Why it matters
--------------
Quantized Linears (bitsandbytes, MXFP4 and the like) override `forward` to dequantize. A LoRA that is injected by calling
`torch.nn.Linear.forward(self, x)` bypasses that, multiplies with packed or stale weights, and trains against a base that
is not the one that will serve. For a plain Linear the two are equal, so nothing shows until the base is quantized.

How it is detected
------------------
Logits under the LoRA must agree to 1e-4 of the largest value.

How to fix
----------
Add the LoRA's delta to what the module itself returns (a forward hook, or `self.base_layer(x)` in PEFT).
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, difference, probe_batch
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig


class _DoublingLinear(nn.Linear):
    """A stand-in for a quantized Linear: it computes something else than its weights show."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare overridden forwards with doubled weights."""
    plain = subject.twin()
    if not _linears(subject.implementation, plain, subject.config):
        return Inapplicable(f"no target is a Linear: {', '.join(subject.config.target_modules)}")
    batch = probe_batch(subject)
    lora = plain.lora(batch)
    for linear in _linears(subject.implementation, plain, subject.config):
        linear.weight.mul_(2)
        if linear.bias is not None:
            linear.bias.mul_(2)
    overriding = subject.twin()
    for linear in _linears(subject.implementation, overriding, subject.config):
        linear.__class__ = _DoublingLinear
    error = difference(overriding.logits(batch, lora), plain.logits(batch, lora))
    if error > TOLERANCE:
        return Fail(
            message="the LoRA bypasses the forward of the layer that it adapts",
            expected=f"an overridden forward counts: a difference of at most {TOLERANCE:g} of the largest value",
            actual=f"{error:.2g}",
            remedy="add the LoRA to what the module itself returns, through a forward hook or self.base_layer(x)",
            evidence={"difference": error},
        )
    return Pass(f"an overridden forward is honoured (difference {error:.1g})", {"difference": error})


def _linears(implementation: Implementation, model: Model, config: "RunConfig") -> list[nn.Linear]:
    found = implementation.targets(model.base, config.target_modules)
    return [module for modules in found.values() for module in modules if isinstance(module, nn.Linear)]


def _bypass(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let every target compute torch's Linear, whatever class it has."""
    model = healthy.build(base, config)
    for linear in _linears(healthy, model, config):
        linear.forward = partial(nn.Linear.forward, linear)  # type: ignore[method-assign]
    return model


RULE = Rule(
    code="LOR201",
    name="base-forward-bypassed",
    stage="twin",
    severity="error",
    sources=("fix 4", "failure mode F4"),
    requires=("HYP201",),
    check=check,
    faults=(
        Fault("linear-forward", "nn.Linear.forward(self, x) is called instead of the module", override(build=_bypass)),
    ),
)
