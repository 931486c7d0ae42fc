"""The Mixture-of-Experts block computes what OpenAI's reference computes, where the clamp acts too.

What it does
------------
Runs the whole MLP block of the first and last layer of the tiny twin, as the run holds it, on inputs so large that gate and
up leave their limits on both sides, and compares the outputs with the published formulas.

Why it matters
--------------
Without the clamp, with another alpha or without the `+ 1`, experts differ only where activations are large, as they are in
the real model: every test on small inputs passes, and quality is lost from the first step.

How it is detected
------------------
In float64, outputs must agree to 1e-7 of the largest value: a gate that is clamped from below too differs by 1e-5 only.
Experts that stay packed are computed one by one on a CPU, and a layer at once on newer GPUs: that is judged too, in
float32, where outputs must agree to 1e-4, of many tokens and of a few at a time, as an answer has them. Gradients are QNT202's.

How to fix
----------
Clamp the gate from above and up from both sides at 7.0, then `(up + 1) · gate · sigmoid(1.702 · gate)`.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import experts
from checks.probes import TOLERANCE, base_in_double, difference, hidden_states, large_inputs
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


EXACT = 1e-7  # float64 rounds by 1e-15 here
AT_ONCE, FEW = ", a layer at once", ", a layer at once and a few tokens"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the outputs of two blocks, and make sure that the clamp has an effect on them."""
    config = subject.twin_base_config
    if config.model_type != "gpt_oss":
        return Inapplicable(f"{config.model_type} has no experts of GPT-OSS")
    top_k, alpha = config.num_experts_per_tok, getattr(config, "swiglu_alpha", experts.ALPHA)
    limit = getattr(config, "swiglu_limit", experts.LIMIT)
    evidence: dict[str, float] = {}
    for way, bound, base in _ways(subject):
        # a few tokens are as many as leave an expert without a route
        tokens = (base.config.num_local_experts - 1) // top_k if way == FEW else None
        differences = _differences(config, base, top_k, alpha, limit, tokens)
        found = {f"layer {number}{way}": value for number, value in differences}
        evidence |= found
        worst = max(found, key=lambda key: found[key])
        if found[worst] > bound:
            return Fail(
                message="the experts compute another function than GPT-OSS",
                expected=f"top-{top_k} routing and the clamped SwiGLU, within {bound:g} of the largest value",
                actual=f"{worst}: {found[worst]:.2g} off",
                remedy=f"clamp gate from above and up from both sides at {limit:g}, then "
                f"(up + 1) · gate · sigmoid({alpha:g} · gate)",
                evidence=evidence,
            )
    exact = max(value for place, value in evidence.items() if AT_ONCE not in place)
    return Pass(f"blocks compute the published formulas to {exact:.1g}, beyond the clamp too", evidence)


def _ways(subject: "Subject") -> Iterator[tuple[str, float, Any]]:
    """Yield each way of computing the experts: its mark in the evidence, how far off it may be, and a base."""
    yield "", EXACT, base_in_double(subject.twin_base())
    if (base := subject.grouped_twin_base()) is not None:
        yield AT_ONCE, TOLERANCE, base
    if (base := subject.answering_twin_base()) is not None:
        yield FEW, TOLERANCE, base


def _differences(
    config: Any, base: Any, top_k: int, alpha: float, limit: float, tokens: int | None
) -> Iterator[tuple[int, float]]:
    """Yield first and last layer, and how far their blocks are off the formulas.

    Args:
        tokens: how many the block is given at a time; None: all.
    """
    layers = base.get_decoder().layers
    for number in dict.fromkeys((0, len(layers) - 1)):
        block = layers[number].mlp
        weights = experts.Weights.of_block(block.state_dict())
        x = large_inputs(config.hidden_size, seed=number)
        expected, unclamped = (experts.block(x, weights, top_k, alpha=alpha, limit=at) for at in (limit, math.inf))
        assert difference(unclamped, expected) > EXACT, "the probe does not reach the clamp"
        outputs = [hidden_states(block(part[None].to(base.dtype))) for part in x.split(tokens or len(x))]
        yield number, difference(torch.cat(outputs).double(), expected)


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


def _grouped_experts_with(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Any:
    """Make a fault of experts that are computed a layer at once: they read other hidden states, indices or weights."""

    def build_base(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
        base = healthy.build_base(base_config, plan, seed)
        for layer in base.get_decoder().layers if plan.expert_products.value == "grouped" else ():
            layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: change(module, *inputs))
        return base

    return override(build_base=build_base, unless=_not_packed)


def _next_expert(module: Any, states: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return states, (indices + 1) % module.get_buffer("down_proj_blocks").shape[0], weights


def _next_expert_of_a_token(
    module: Any, states: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _next_expert(module, states, indices, weights) if len(states) == 1 else (states, indices, weights)


def _states_of_another(module: Any, states: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    few = indices.numel() < module.get_buffer("down_proj_blocks").shape[0]
    return states.roll(1, 0) if few else states, indices, weights


def _next_weight(module: Any, states: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return states, indices, weights.roll(1, -1)


def _not_packed(subject: "Subject") -> str:
    if subject.twin_plan.experts.value != "packed":
        return "no experts stay packed"
    return "every token has one expert, of weight 1" if subject.twin_base_config.num_experts_per_tok == 1 else ""


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
        Fault(
            "offsets-shifted",
            "a layer at once, and every token's rows meet the next expert",
            _grouped_experts_with(_next_expert),
        ),
        Fault(
            "answers-shifted",
            "a layer at once, and a token by itself meets the next expert",
            _grouped_experts_with(_next_expert_of_a_token),
        ),
        Fault(
            "answers-mixed",
            "a layer at once, and a few tokens read each other's states",
            _grouped_experts_with(_states_of_another),
        ),
        Fault(
            "weights-of-the-neighbour",
            "a layer at once, and every route has another route's weight",
            _grouped_experts_with(_next_weight),
        ),
    ),
)
