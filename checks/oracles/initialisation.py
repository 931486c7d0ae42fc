"""The distribution that every parameter of the hypernetwork is drawn from, under the reference's names.

Source: the reference implementation (SakanaAI/doc-to-lora): torch's default for Linears, einops' for stacks of them (EinMix),
and explicit draws for head, bias and scalers, so that the LoRA starts at zero and grows alike at every rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """Mean and standard deviation; and, where values are drawn from an interval, its half width."""

    mean: float
    deviation: float
    bound: float | None = None


def distribution(
    name: str, shape: Sequence[int], *, latent_size: int, rank: int, query_scale: float, inputs: int
) -> Distribution | None:
    """Return the distribution of a parameter; None where no rule is known.

    Args:
        name: such as `head.weight`.
        shape: of the parameter.
        latent_size, rank: of the hypernetwork.
        query_scale: factor on the weights of the Perceiver's queries.
        inputs: inputs of the layer that the parameter is of, for a bias (its weight shows them for itself).
    """
    kind = name.split(".")[0]
    if kind in ("scaler_B", "bias_B"):
        return Distribution(0.0, 0.0)
    if kind == "scaler_A" or (len(shape) == 1 and name.endswith("weight")):
        return Distribution(1.0, 0.0)
    if kind == "bias_A":
        return Distribution(0.0, 0.2 / math.sqrt(shape[-1] * rank))
    if name == "head.weight":
        return Distribution(0.0, 0.5 / math.sqrt(latent_size + shape[-1] * rank))
    if name.endswith("latents_q"):
        return Distribution(0.0, 1.0)
    if name.endswith("bias"):
        return _uniform(math.sqrt(1 / inputs)) if inputs else Distribution(0.0, 0.0)
    if len(shape) == 3:  # EinMix, [layers, inputs, outputs]
        return _uniform(math.sqrt(3 / shape[1]))
    if len(shape) == 2:  # Linear, [outputs, inputs]
        return _uniform((query_scale if ".q_proj." in name else 1.0) / math.sqrt(shape[1]))
    return None


def _uniform(bound: float) -> Distribution:
    return Distribution(0.0, bound / math.sqrt(3), bound)
