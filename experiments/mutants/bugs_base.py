"""Mutants of MXFP4, experts and the loading of the base."""

from experiments.mutants.mutant import bugs

_AREA = "base"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.base.mxfp4:_tables",
        "mxfp4",
        (
            "nibbles-swapped",
            "elements[codes & 0x0F], elements[codes >> 4]",
            "elements[codes >> 4], elements[codes & 0x0F]",
            "every pair of weights is exchanged",
        ),
        ("exponent-bias-128", "codes - _BIAS", "codes - _BIAS - 1", "experts are half as strong"),
        ("sign-lost", "*(-value for value in _MAGNITUDES)", "*(value for value in _MAGNITUDES)", "no negative weight"),
        (
            "zero-is-negative-half",
            "*(-value for value in _MAGNITUDES)",
            "*(-value or -0.5 for value in _MAGNITUDES)",
            "code 8 is read as a weight",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.mxfp4:_MAGNITUDES",
        "mxfp4",
        ("largest-code-wrong", "4.0, 6.0)", "4.0, 5.0)", "the largest weights are too small"),
        ("one-code-wrong", "1.0, 1.5, 2.0", "1.0, 1.25, 2.0", "a sixteenth of the weights is wrong"),
    ),
    *bugs(
        _AREA,
        "d2l.base.mxfp4:_look_up",
        "mxfp4",
        (
            "scale-of-the-block-before",
            "factors[scales.int()]",
            "factors[scales.roll(1, -1).int()]",
            "every block has its neighbour's scale",
        ),
        (
            "one-scale-for-a-row",
            "factors[scales.int()]",
            "factors[scales.amax(-1, keepdim=True).expand_as(scales).int()]",
            "weights of small blocks are far too large",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.experts:PackedExperts._activate",
        "experts",
        ("gate-not-clamped", ".clamp(max=self.limit)", "", "large activations differ from the model's own"),
        ("up-not-clamped", ".clamp(-self.limit, self.limit)", "", "large activations differ from the model's own"),
        (
            "gate-clamped-below-too",
            ".clamp(max=self.limit)",
            ".clamp(-self.limit, self.limit)",
            "the experts compute something else",
        ),
        ("up-without-one", "(up + 1)", "up", "the experts compute something else"),
        ("alpha-lost", "gate * self.alpha", "gate", "the experts compute something else"),
        (
            "gate-and-up-in-halves",
            "gate_up[..., 0::2].clamp(max=self.limit)\n        up = gate_up[..., 1::2]",
            "gate_up.chunk(2, -1)[0].clamp(max=self.limit)\n        up = gate_up.chunk(2, -1)[1]",
            "the experts compute something else",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.experts:PackedExperts.forward",
        "experts",
        ("experts-unweighted", "output * routing_weights[token, slot, None]", "output", "router ignored"),
        (
            "last-expert-never-runs",
            "router_indices.unique().tolist()",
            "router_indices.unique().tolist()[:-1]",
            "tokens lose a part of their experts",
        ),
        (
            "experts-block-gradients",
            "hidden_states[token])",
            "hidden_states[token].detach())",
            "no gradient through the experts",
        ),
        (
            "router-gradient-lost",
            "routing_weights[token, slot, None]",
            "routing_weights.detach()[token, slot, None]",
            "no gradient through the router",
        ),
        (
            "first-choice-only",
            "torch.where(router_indices == expert)",
            "torch.where(router_indices[:, :1] == expert)",
            "one expert a token instead of four",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.experts:PackedExperts._project",
        "experts",
        (
            "expert-bias-lost",
            ".apply(inputs, blocks, scales) + bias",
            ".apply(inputs, blocks, scales)",
            "the experts compute something else",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.experts:_PackedLinear.backward",
        "experts",
        (
            "backward-by-other-scales",
            "dequantize(blocks, scales, grad_output.dtype)",
            "dequantize(blocks, scales.clamp(min=127), grad_output.dtype)",
            "gradients through the experts are wrong",
        ),
        (
            "backward-is-zero",
            "return grad_output @ dequantize",
            "return 0 * grad_output @ dequantize",
            "no gradient through the experts",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.experts:PackedExperts.like",
        "experts",
        ("limit-of-one", "limit=dense.limit", "limit=1.0", "the experts compute something else"),
        ("alpha-of-one", "alpha=dense.alpha", "alpha=1.0", "the experts compute something else"),
    ),
    *bugs(
        _AREA,
        "d2l.base.load:_frozen",
        "load",
        ("base-not-frozen", "model.requires_grad_(False)", "pass", "gradients of the whole base: out of memory"),
    ),
    *bugs(
        _AREA,
        "d2l.base.load:_frozen_config",
        "load",
        ("dropout-stays", "setattr(config, name, 0.0)", "pass", "noise in every step with checkpointing"),
    ),
    *bugs(
        _AREA,
        "d2l.base.files:refuse_incomplete",
        "load",
        (
            "incomplete-checkpoint-accepted",
            "for kind, names in found.items() if names]",
            "for kind, names in found.items() if False]",
            "missing weights stay what they were: random",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.files:read_tensors",
        "load",
        (
            "weights-rounded",
            "tensor.to(dtype) if",
            "tensor.to(torch.float8_e4m3fn).to(dtype) if",
            "the base's weights are rounded to eight bits",
        ),
        (
            "sinks-lost",
            "yield name, tensor.to(dtype) if",
            'yield name, tensor.to(dtype) * ("sinks" not in name) if',
            "attention sinks are zero",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.load:_load_with_transformers",
        "load",
        (
            "norms-in-half-precision",
            "parameter.data.to(plan.torch_dtype)",
            "parameter.data.half().to(plan.torch_dtype)",
            "weights are rounded",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.load:quantization_method",
        "load",
        ("mxfp4-not-recognised", "if settings is None:", "if True:", "packed experts are read as dense ones"),
    ),
]
