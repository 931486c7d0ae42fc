"""The Mixture-of-Experts block of GPT-OSS, token by token.

Source: OpenAI's reference, https://github.com/openai/gpt-oss (`gpt_oss/torch/model.py`, `MLPBlock` and `swiglu`): the
router's top-k logits go through a softmax among themselves; gate and up are the even and odd rows of one projection;
the gate is clamped from above only, up from both sides; SwiGLU with alpha 1.702 and up + 1; all projections have biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from checks.oracles.mxfp4 import decode

ALPHA, LIMIT = 1.702, 7.0


@dataclass(frozen=True, eq=False)
class Weights:
    """The block's weights, as a checkpoint has them after decoding: E experts, hidden size H, intermediate size I.

    Attributes:
        router, router_bias: [E, H] and [E].
        gate_up, gate_up_bias: [E, 2 I, H] and [E, 2 I], gate in the even rows.
        down, down_bias: [E, H, I] and [E, H].
    """

    router: Tensor
    router_bias: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @classmethod
    def of_block(cls, state: Mapping[str, Tensor]) -> "Weights":
        """Read a block's state dict under the names of the official checkpoints (MXFP4) or of transformers (dequantized)."""

        def projection(name: str) -> Tensor:
            if f"experts.{name}_blocks" in state:
                return decode(state[f"experts.{name}_blocks"], state[f"experts.{name}_scales"])
            return state[f"experts.{name}"].transpose(1, 2)

        return cls(
            router=state["router.weight"],
            router_bias=state["router.bias"],
            gate_up=projection("gate_up_proj"),
            gate_up_bias=state["experts.gate_up_proj_bias"],
            down=projection("down_proj"),
            down_bias=state["experts.down_proj_bias"],
        )

    def double(self) -> "Weights":
        """Return the same weights in float64."""
        return Weights(**{field.name: getattr(self, field.name).double() for field in fields(self)})


def block(x: Tensor, weights: Weights, top_k: int, *, alpha: float = ALPHA, limit: float = LIMIT) -> Tensor:
    """Return the block's output [T, H], float64, for inputs [T, H]; differentiable.

    Args:
        top_k: experts of each token.
        alpha, limit: of the clamped SwiGLU.
    """
    weights, outputs = weights.double(), []
    for token in x.double():
        scores = weights.router @ token + weights.router_bias
        chosen = scores.argsort(descending=True)[:top_k]
        shares = torch.softmax(scores[chosen], dim=0)
        outputs.append(
            torch.stack(
                [s * expert(token, weights, int(e), alpha, limit) for s, e in zip(shares, chosen, strict=True)]
            ).sum(0)
        )
    return torch.stack(outputs)


def expert(token: Tensor, weights: Weights, number: int, alpha: float = ALPHA, limit: float = LIMIT) -> Tensor:
    """Return the output [H] of one expert for one token [H]."""
    both = weights.gate_up[number] @ token + weights.gate_up_bias[number]
    gate, up = both[0::2].clamp(max=limit), both[1::2].clamp(min=-limit, max=limit)
    return weights.down[number] @ ((up + 1) * gate * torch.sigmoid(alpha * gate)) + weights.down_bias[number]
