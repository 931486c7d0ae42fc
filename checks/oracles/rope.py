"""Rotary positions from their papers' formulas, in float64, from the values of a config alone.

Sources: RoFormer (arXiv 2104.09864) for the frequencies; positions divided by a factor (arXiv 2306.15595); YaRN, equations 17 to
22 and its attention factor (arXiv 2309.00071), with gpt-oss's range that is not rounded (`truncate: false`); and Llama 3.1's
own scaling (its reference code, `apply_scaling`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "yarn", "llama3")


def frequencies(values: Mapping[str, Any], head_size: int) -> Tensor:
    """Return the angle per position of each pair of dimensions.

    Args:
        values: `rope_parameters` of a config.
        head_size: dimensions of a head.

    Returns:
        [rotated dimensions / 2], float64, in radians a position.
    """
    size = int(head_size * values.get("partial_rotary_factor", 1.0))
    plain = torch.tensor([values["rope_theta"] ** (-2 * pair / size) for pair in range(size // 2)], dtype=torch.float64)
    match values.get("rope_type", "default"):
        case "default":
            return plain
        case "linear":
            return plain / values["factor"]
        case "llama3":
            return torch.tensor([_llama3(float(it), values) for it in plain], dtype=torch.float64)
        case "yarn":
            kept = torch.tensor([_kept(pair, size, values) for pair in range(size // 2)], dtype=torch.float64)
            return plain * kept + plain / values["factor"] * (1 - kept)
    raise ValueError(f"no formula for rope_type {values['rope_type']}: expected one of {', '.join(KINDS)}")


def attention_factor(values: Mapping[str, Any]) -> float:
    """Return what cosine and sine are multiplied by: 1, and in YaRN 0.1 ln(factor) + 1, or what the config has."""
    if values.get("rope_type") != "yarn":
        return 1.0
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    factor, one, other = values["factor"], values.get("mscale"), values.get("mscale_all_dim")
    return _mscale(factor, one) / _mscale(factor, other) if one and other else _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _kept(pair: int, size: int, values: Mapping[str, Any]) -> float:
    """Return the share of a pair's own frequency in YaRN: 1 for fast pairs, 0 for slow ones, linear between."""
    low = _pair_of(values.get("beta_fast") or 32, size, values)
    high = _pair_of(values.get("beta_slow") or 1, size, values)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return 1 - min(max((pair - low) / (high - low if high != low else 0.001), 0.0), 1.0)


def _pair_of(turns: float, size: int, values: Mapping[str, Any]) -> float:
    """Return the pair that turns so often within the original positions."""
    positions, base = values["original_max_position_embeddings"], values["rope_theta"]
    return size * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))


def _llama3(frequency: float, values: Mapping[str, Any]) -> float:
    """Return the frequency as it is where it is fast, divided by the factor where it is slow, and smooth between."""
    turns = values["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * kept + frequency / values["factor"] * (1 - kept)
