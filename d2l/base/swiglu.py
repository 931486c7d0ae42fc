"""The activation of GPT-OSS's experts: a SwiGLU whose gate is clamped from above and whose up from both sides.

Source: https://github.com/openai/gpt-oss (`gpt_oss/torch/model.py`, `swiglu`).
"""

import torch
from torch import Tensor


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return (up + 1) · gate · sigmoid(alpha · gate) of clamped gate and up, all of one shape."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))
