"""Gradients pass through the experts of every layer, and are those of the dequantized experts.

What it does
------------
Takes, on the tiny twin of an MXFP4 model, the gradient of a loss of its logits by the input of every layer's MLP, with the
run's experts and with dense experts that hold the same values; and the gradient of whole MLP blocks by inputs so large that
their clamp acts, against the published formulas. Packed experts are taken both ways there: one by one as on a CPU, and a
layer at once as on newer GPUs.

Why it matters
--------------
An MLP without a backward still lets gradients through the residual stream: the loss is identical, `grad_norm` is above
zero, and every layer below gets a gradient that points elsewhere. Only a comparison layer by layer shows it.

How it is detected
------------------
For every layer the cosine of the two gradients must be above 0.999 and their norms within 1%; those of the blocks must
be the formulas' to 1e-4 of the largest value.

How to fix
----------
Set `expert_weights: packed` or `dequantize`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import experts
from checks.probes import (
    TOLERANCE,
    base_in_double,
    difference,
    hidden_states,
    large_inputs,
    probe_batch,
)
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare each layer's gradient by cosine and norm."""
    if subject.twin_plan.experts.value == "dense":
        return Inapplicable(f"{subject.twin_plan.experts.reason}: there are no MXFP4 experts")
    dense_plan = replace(subject.twin_plan, experts=replace(subject.twin_plan.experts, value="dequantize"))
    dense = subject.implementation.build_base(subject.twin_base_config, dense_plan, 0)
    pairs = list(zip(_layer_gradients(subject, subject.twin_base()), _layer_gradients(subject, dense), strict=True))
    cosines = [float(torch.cosine_similarity(own.flatten(), true.flatten(), dim=0)) for own, true in pairs]
    ratios = [float(own.norm() / true.norm()) for own, true in pairs]
    evidence = {"cosine_by_layer": cosines, "norm_ratio_by_layer": ratios}
    wrong = [
        i
        for i, (cosine, ratio) in enumerate(zip(cosines, ratios, strict=True))
        if not (cosine > 0.999 and abs(ratio - 1) < 0.01)
    ]
    if wrong:
        layer = wrong[0]
        return Fail(
            message="gradients through the experts are missing or wrong",
            expected="in every layer a cosine above 0.999 to the dequantized experts, norms within 1%",
            actual=f"layer {layer}: cosine {cosines[layer]:.3f}, norm ratio {ratios[layer]:.3f}; "
            f"{len(wrong)} of {len(pairs)} layers",
            remedy="set expert_weights: packed or dequantize",
            evidence=evidence,
        )
    beyond = _beyond_the_clamp(subject)
    place = max(beyond, key=lambda key: beyond[key])
    if beyond[place] > TOLERANCE:
        return Fail(
            message="gradients through the experts are wrong where their clamp acts",
            expected=f"those of the clamped SwiGLU, within {TOLERANCE:g} of the largest value",
            actual=f"{place}: {beyond[place]:.2g} off",
            remedy="set expert_weights: packed or dequantize",
            evidence={**evidence, "beyond_the_clamp": beyond},
        )
    return Pass(
        f"gradients of all {len(pairs)} layers agree with dequantized experts (cosine ≥ {min(cosines):.6f})", evidence
    )


def _beyond_the_clamp(subject: "Subject") -> dict[str, float]:
    """Compare the gradient of MLP blocks by large inputs with the formulas': difference by layer, each way."""
    one_by_one = _block_gradients(subject, base_in_double(subject.twin_base()))
    found = {f"layer {number}": value for number, value in one_by_one.items()}
    if (base := subject.grouped_twin_base()) is not None:
        found |= {f"layer {number}, at once": value for number, value in _block_gradients(subject, base).items()}
    return found


def _block_gradients(subject: "Subject", base: Any) -> dict[int, float]:
    """Return how far the gradients of first and last block are off the formulas'."""
    config, layers = subject.twin_base_config, base.get_decoder().layers
    settings = {
        "top_k": config.num_experts_per_tok,
        "alpha": getattr(config, "swiglu_alpha", experts.ALPHA),
        "limit": getattr(config, "swiglu_limit", experts.LIMIT),
    }
    found = {}
    for number in dict.fromkeys((0, len(layers) - 1)):
        block, x = layers[number].mlp, large_inputs(config.hidden_size, seed=number).requires_grad_()
        weights = experts.Weights.of_block(block.state_dict())
        probe = large_inputs(config.hidden_size, seed=number + 1)
        outputs = hidden_states(block(x[None].to(base.dtype))), experts.block(x, weights, **settings)
        own, true = (torch.autograd.grad((output * probe).sum(), x)[0] for output in outputs)
        found[number] = difference(own, true)
    return found


def _layer_gradients(subject: "Subject", base: Any) -> list[Tensor]:
    """Compute the gradient of a loss of the base's logits by the input of each decoder layer's MLP."""
    inputs: list[Tensor] = []

    def keep(module: Any, arguments: Any) -> Any:
        inputs.append(arguments[0] if arguments[0].requires_grad else arguments[0].requires_grad_())
        return None

    hooks = [layer.post_attention_layernorm.register_forward_pre_hook(keep) for layer in base.get_decoder().layers]
    try:
        loss = base(input_ids=probe_batch(subject).input_ids, use_cache=False).logits.logsumexp(-1).sum()
    finally:
        for hook in hooks:
            hook.remove()
    return list(torch.autograd.grad(loss, inputs))


def _hooked(base: Any, hook: Callable[[Any, Any, Any], Any]) -> Any:
    """Let a hook change what the experts of every layer return."""
    for module in (layer.mlp for layer in base.get_decoder().layers if hasattr(layer.mlp, "experts")):
        module.experts.register_forward_hook(hook)
    return base


def _without_backward(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
    """Let the experts compute the same values and cut the graph."""
    base = healthy.build_base(base_config, plan, seed)
    return base if plan.experts.value == "dequantize" else _hooked(base, lambda module, inputs, output: output.detach())


def _through_the_clamp(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
    """Let the experts compute the same values, with a gradient more where inputs are far larger than after a norm."""

    def leak(module: Any, inputs: Any, output: Any) -> Any:
        beyond = torch.relu(inputs[0].abs() - 6)
        return output + (beyond - beyond.detach())

    return _hooked(healthy.build_base(base_config, plan, seed), leak)


def _grouped_without_router(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
    """Let no gradient reach the routing weights of experts that are computed a layer at once."""
    base = healthy.build_base(base_config, plan, seed)
    for layer in base.get_decoder().layers if plan.expert_products.value == "grouped" else ():
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: (*inputs[:2], inputs[2].detach()))
    return base


def _not_packed(subject: "Subject") -> str:
    if subject.twin_plan.experts.value != "packed":
        return "no experts stay packed"
    return "every token has one expert, of weight 1" if subject.twin_base_config.num_experts_per_tok == 1 else ""


def _dequantized(subject: "Subject") -> str:
    return "the run's experts are the dequantized ones" if subject.twin_plan.experts.value == "dequantize" else ""


RULE = Rule(
    code="QNT202",
    name="experts-gradient-missing",
    stage="twin",
    severity="error",
    sources=("fix 1", "failure mode F1", "failure mode 16", "failure mode 18", "failure mode C4"),
    requires=("LOR204", "QNT204"),
    check=check,
    faults=(
        Fault(
            "detached-experts",
            "experts without a backward, grad_norm stays above zero",
            override(build_base=_without_backward, unless=_dequantized),
        ),
        Fault(
            "through-the-clamp",
            "gradients pass where the clamp should stop them",
            override(build_base=_through_the_clamp),
        ),
        Fault(
            "router-detached-at-once",
            "a layer at once, and no gradient reaches the routing weights",
            override(build_base=_grouped_without_router, unless=_not_packed),
        ),
    ),
)
