"""Positions turn queries and keys by the angles of the base's own config, near and far.

What it does
------------
Asks the rotary module of the loaded base for cosine and sine at positions within the original length and far beyond it,
and compares them with the papers' formulas of the config's `rope_parameters`: frequencies, the scaling of YaRN or Llama 3,
and the factor on attention.

Why it matters
--------------
A scaling that is dropped, rounded (`truncate`) or read under an old key leaves short rows as they are: every test on them passes.
Long documents alone come out worse, in training and when the adapter is served by somebody who has the scaling right.

How it is detected
------------------
At each of the probe's positions the largest error must be below that of float32 angles. A base with a kind of scaling for
which there is no formula here (`longrope`, `dynamic`) is not judged.

How to fix
----------
Keep `rope_parameters` of the base's config as they are; load the base through transformers, in the version that d2l names.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.oracles.rope import KINDS, attention_factor, frequencies
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from checks.training.steps import still_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from checks.implementation import Implementation
    from checks.subject import Subject

POSITIONS = (0, 1, 2, 63, 64, 65, 500, 4095, 4096, 5000)  # a twin's original length is 64, gpt-oss's 4,096
TOLERANCE = 2e-3  # 5,000 radians in float32 are off by 2e-4; a lost scaling is off by 1


def check(subject: "Subject") -> Result:
    """Compare cosine and sine of every rotary module with the formulas."""
    base = still_model(subject).base
    expected = _parameters(base.config)
    kinds = {values.get("rope_type", "default") for values in expected.values()}
    if not expected or not kinds <= set(KINDS):
        return Inapplicable(
            f"no formula here for the base's positions ({', '.join(sorted(kinds)) or 'no rope_parameters'})"
        )
    errors = {}
    for name, module in _rotary_modules(base):
        for kind, values in expected.items():
            errors[f"{name} {kind}".strip()] = _error(module, kind, values, _head_size(base.config))
    if not errors:
        return Inapplicable("the base has no rotary module")
    worst = max(errors, key=lambda name: errors[name])
    evidence = {"errors": errors, "rope_parameters": {kind or "all": dict(values) for kind, values in expected.items()}}
    if not errors[worst] <= TOLERANCE:
        return Fail(
            message="positions turn by other angles than the base's config has",
            expected=f"cosine and sine within {TOLERANCE:g} of the formulas, at positions up to {POSITIONS[-1]:,}",
            actual=f"{worst} is off by {errors[worst]:.2g}",
            remedy="leave the config's rope_parameters and the rotary module alone, and its frequencies in float32",
            evidence=evidence,
        )
    return Pass(f"{', '.join(sorted(kinds))}: angles up to position {POSITIONS[-1]:,} to {errors[worst]:.1g}", evidence)


def _parameters(config: "PreTrainedConfig") -> dict[str, Mapping[str, Any]]:
    """Return the rope parameters by layer type, under an empty name where all layers have the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        used = set(getattr(config, "layer_types", None) or rope)
        return {kind: values for kind, values in rope.items() if isinstance(values, dict) and kind in used}
    return {"": rope} if "rope_theta" in rope else {}


def _rotary_modules(base: Any) -> list[tuple[str, Any]]:
    return [
        (name, it)
        for name, it in base.named_modules()
        if any("inv_freq" in buffer for buffer, _ in it.named_buffers(recurse=False))
    ]


def _head_size(config: "PreTrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def _error(module: Any, kind: str, values: Mapping[str, Any], head_size: int) -> float:
    """Return the largest error of cosine and sine."""
    positions = torch.tensor([POSITIONS])
    like = torch.zeros(1, dtype=torch.float64)
    cosine, sine = module(like, positions, *([kind] if kind else []))
    angles = positions[0].double()[:, None] * frequencies(values, head_size)
    factor = attention_factor(values)
    wanted = (angles.cos() * factor, angles.sin() * factor)
    return max(_off(actual[0].double(), it) for actual, it in zip((cosine, sine), wanted, strict=True))


def _off(actual: Tensor, expected: Tensor) -> float:
    """Compare with values that stand once, or in two halves, or twice beside each other, as Cohere has them."""
    layouts = expected, torch.cat((expected, expected), dim=1), expected.repeat_interleave(2, dim=1)
    return min((float((actual - it).abs().max()) for it in layouts if it.shape == actual.shape), default=float("inf"))


def _rotary_fault(change: Callable[[Any], None], unless: Callable[["Subject"], str]) -> Any:
    """Make a fault in the rotary modules of every base that is built or loaded."""

    def spoilt(base: Any) -> Any:
        for _, module in _rotary_modules(base):
            change(module)
        return base

    def build_base(healthy: "Implementation", base_config: Any, plan: Any, seed: int) -> Any:
        return spoilt(healthy.build_base(base_config, plan, seed))

    def load_base(healthy: "Implementation", folder: Any, plan: Any) -> Any:
        return spoilt(healthy.load_base(folder, plan))

    return override(build_base=build_base, load_base=load_base, unless=unless)


def _without_formula(subject: "Subject") -> str:
    kinds = {it.get("rope_type", "default") for it in _parameters(subject.twin_base_config).values()}
    return "" if kinds and kinds <= set(KINDS) else "there is no formula for the base's positions"


def _without_factor(subject: "Subject") -> str:
    factors = map(attention_factor, _parameters(subject.twin_base_config).values())
    return _without_formula(subject) or ("" if any(it != 1 for it in factors) else "the base's attention has no factor")


def _frequencies_of(module: Any) -> list[Tensor]:
    buffers = module.named_buffers(recurse=False)
    return [value for name, value in buffers if name.endswith("inv_freq") and "original" not in name]


def _faster(module: Any) -> None:
    """Turn twice as fast, as with another rope_theta."""
    for value in _frequencies_of(module):
        value.mul_(2)


def _rounded(module: Any) -> None:
    """Round the frequencies, as a cast of the whole model to bfloat16 does."""
    for value in _frequencies_of(module):
        value.copy_(value.bfloat16())


def _unscaled(module: Any) -> None:
    """Turn as if the config had no scaling: right on short rows of the original model, wrong on all of this one."""
    values = _parameters(module.config).get("") or {}
    for value in _frequencies_of(module):
        value.copy_(frequencies({**values, "rope_type": "default"}, _head_size(module.config)))


def _unscaled_unless(subject: "Subject") -> str:
    values = _parameters(subject.twin_base_config).get("") or {}
    scaled = values.get("rope_type", "default") != "default"
    return _without_formula(subject) or ("" if scaled else "the base's positions have no scaling that all layers share")


def _factor_lost(module: Any) -> None:
    """Leave YaRN's factor on attention out."""
    module.attention_scaling = 1.0


RULE = Rule(
    code="ATT203",
    name="positions-turned-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode C2", "failure mode C3", "https://arxiv.org/abs/2309.00071"),
    requires=("HYP201",),
    check=check,
    faults=(
        Fault("other-base", "frequencies of another rope_theta", _rotary_fault(_faster, _without_formula)),
        Fault("scaling-lost", "frequencies without the config's scaling", _rotary_fault(_unscaled, _unscaled_unless)),
        Fault("rounded-frequencies", "frequencies cast to bfloat16", _rotary_fault(_rounded, _without_formula)),
        Fault("factor-lost", "no factor of YaRN on attention", _rotary_fault(_factor_lost, _without_factor)),
    ),
)
