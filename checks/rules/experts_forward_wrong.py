"""The Mixture-of-Experts block computes what OpenAI's reference computes, where the clamp acts too.

What it does
------------
Runs the whole MLP block of the first and last layer of the tiny twin, as the run holds it, on inputs so large that gate and
up leave their limits on both sides, and compares outputs and gradients by the inputs with the published formulas.

Why it matters
--------------
Without the clamp, with another alpha or without the `+ 1`, experts differ only where activations are large, as they are in
the real model: every test on small inputs passes, and quality is lost from the first step.

How it is detected
------------------
In float64, outputs and gradients must agree to 1e-4 of the largest value.

How to fix
----------
Clamp the gate from above and up from both sides at 7.0, then `(up + 1) · gate · sigmoid(1.702 · gate)`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.oracles import experts, mxfp4
from checks.probes import TOLERANCE, difference
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import Implementation

if TYPE_CHECKING:
    from checks.subject import Subject

TOKENS, SIZE = 10, 8.0  # of the inputs; the twin's projections bring them to several times the clamp's limit


def check(subject: "Subject") -> Result:
    """Compare outputs and input gradients of two blocks."""
    config = subject.twin_base_config
    if config.model_type != "gpt_oss":
        return Skip(f"{config.model_type} has no experts of GPT-OSS")
    base = subject.twin_base().double()
    settings = {
        "alpha": getattr(config, "swiglu_alpha", experts.ALPHA),
        "limit": getattr(config, "swiglu_limit", experts.LIMIT),
    }
    layers, evidence = base.get_decoder().layers, {}
    for number in dict.fromkeys((0, len(layers) - 1)):
        block = layers[number].mlp
        weights = _weights(block.state_dict())
        generator = torch.Generator().manual_seed(number)
        x = SIZE * torch.randn(TOKENS, config.hidden_size, generator=generator, dtype=torch.float64)
        probe = torch.randn(TOKENS, config.hidden_size, generator=generator, dtype=torch.float64)
        (actual, own), (expected, true) = (
            _with_gradient(function, x, probe)
            for function in (
                lambda inputs, block=block: _output(block(inputs[None])),
                lambda inputs, weights=weights: experts.block(inputs, weights, config.num_experts_per_tok, **settings),
            )
        )
        free = experts.block(x, weights, config.num_experts_per_tok, **{**settings, "limit": math.inf})
        assert difference(free, expected) > TOLERANCE, "the probe does not reach the clamp"
        evidence[f"outputs of layer {number}"] = difference(actual, expected)
        evidence[f"gradients by the inputs of layer {number}"] = difference(own, true)
    worst = max(evidence, key=lambda key: evidence[key])
    if evidence[worst] > TOLERANCE:
        return Fail(
            message="the experts compute another function than GPT-OSS",
            expected=f"top-{config.num_experts_per_tok} routing, clamped SwiGLU, within {TOLERANCE:g} of the largest value",
            actual=f"{worst}: {evidence[worst]:.2g} off",
            remedy="clamp gate from above and up from both sides at 7.0, then (up + 1) · gate · sigmoid(1.702 · gate)",
            evidence=evidence,
        )
    return Pass(
        f"blocks and their gradients are the published formulas to {evidence[worst]:.1g}, beyond the clamp too",
        evidence,
    )


def _weights(state: Mapping[str, Tensor]) -> experts.Weights:
    """Read a block's weights under the names of the checkpoints, packed or dequantized."""

    def projection(name: str) -> Tensor:
        if f"experts.{name}_blocks" in state:
            return mxfp4.decode(state[f"experts.{name}_blocks"], state[f"experts.{name}_scales"])
        return state[f"experts.{name}"].transpose(1, 2)

    return experts.Weights(
        router=state["router.weight"],
        router_bias=state["router.bias"],
        gate_up=projection("gate_up_proj"),
        gate_up_bias=state["experts.gate_up_proj_bias"],
        down=projection("down_proj"),
        down_bias=state["experts.down_proj_bias"],
    )


def _output(output: Any) -> Tensor:
    """Return the hidden states [T, H], which may come with the router's scores."""
    return (output[0] if isinstance(output, tuple) else output)[0]


def _with_gradient(function: Any, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value, and the gradient of its product with the probe by its inputs; zeros without one."""
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    if not value.requires_grad:
        return value, torch.zeros_like(x)
    return value.detach(), torch.autograd.grad((value * probe).sum(), leaf)[0]


def _experts_with(**values: float) -> Any:
    """Make a fault of experts with another setting of their activation, under transformers' names."""

    def spoilt(base: Any) -> Any:
        for module in base.modules():
            if all(hasattr(module, name) for name in values):
                for name, value in values.items():
                    setattr(module, name, value)
        return base

    def build_base(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
        return spoilt(healthy.build_base(base_config, plan, seed))

    def load_base(healthy: Implementation, folder: Any, plan: Any) -> Any:
        return spoilt(healthy.load_base(folder, plan))

    return override(build_base=build_base, load_base=load_base)


RULE = Rule(
    code="QNT204",
    name="experts-forward-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode C4", "https://github.com/openai/gpt-oss"),
    requires=("QNT203",),
    check=check,
    faults=(
        Fault("clamp-missing", "gate and up are not clamped", _experts_with(limit=1e9)),
        Fault("alpha-1", "SwiGLU with the usual alpha of 1", _experts_with(alpha=1.0)),
        Fault("clamp-early", "the clamp acts at 6 instead of 7", _experts_with(limit=6.0)),
    ),
)
