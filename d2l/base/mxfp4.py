"""MXFP4: the codec, and a layer of experts that stays in it while gradients pass through to the inputs.

Layout of the official checkpoints, per projection: `*_blocks` [experts, out, in / 32, 16] uint8, two 4-bit codes in a
byte with the even element in the low nibble; `*_scales` [experts, out, in / 32] uint8. A value is
E2M1[code] * 2^(scale - 127).
Source: OCP Microscaling Formats (MX) specification 1.0.
"""

from functools import cache
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from d2l.errors import ModelError

BLOCK = 32  # elements that share one scale
BITS_PER_WEIGHT = 4 + 8 / BLOCK
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 codes 0-7; codes 8-15 are their negatives
_LARGEST_EXPONENT = 2  # of an E2M1 element: 6 = 1.5 * 2^2
_BIAS = 127  # of a scale byte
_WORDS = {torch.bfloat16: torch.int32, torch.float32: torch.int64, torch.float64: torch.complex128}  # two elements wide


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a byte stands for [256], its two elements seen as one word; and the factor of a scale [256]. All exact."""
    codes = torch.arange(256)
    elements = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=dtype)
    pairs = torch.stack([elements[codes & 0x0F], elements[codes >> 4]], dim=-1)
    factors = torch.ldexp(torch.ones(256, dtype=torch.float64), codes - _BIAS)
    return pairs.view(_WORDS[dtype]).squeeze(-1).to(device), factors.to(device, dtype)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that the bytes stand for, exactly.

    Args:
        blocks: [..., groups, 16] uint8.
        scales: [..., groups] uint8.
        dtype: bfloat16, float32 or float64; each holds every MXFP4 value whose scale byte is below 253.

    Returns:
        [..., groups * 32] of `dtype`.
    """
    assert blocks.shape[:-1] == scales.shape, f"blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}"
    words, factors = _tables(dtype, blocks.device)
    elements = words.index_select(0, blocks.flatten().int()).view(dtype).view(*scales.shape, BLOCK)
    return elements.mul_(factors[scales.int()].unsqueeze(-1)).flatten(-2)


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest MXFP4 bytes: ties go to the even code, and what exceeds 6 units of a block's scale saturates.

    Args:
        weights: [..., in] floating point and finite, `in` a multiple of 32; read in float32.

    Returns:
        blocks [..., in / 32, 16] uint8 and scales [..., in / 32] uint8.
    """
    assert weights.shape[-1] % BLOCK == 0, f"{weights.shape[-1]} weights in a row do not divide into blocks of {BLOCK}"
    groups = weights.float().unflatten(-1, (-1, BLOCK))
    magnitudes = groups.abs()
    exponents = torch.frexp(magnitudes.amax(-1)).exponent - 1 - _LARGEST_EXPONENT
    exponents = exponents.clamp(-_BIAS, _BIAS)
    magnitudes = torch.ldexp(magnitudes, -exponents.unsqueeze(-1))
    codes = groups.signbit().to(torch.uint8) << 3
    for code, (below, above) in enumerate(pairwise(_MAGNITUDES)):
        middle = (below + above) / 2
        codes += magnitudes >= middle if code % 2 else magnitudes > middle
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + _BIAS).to(torch.uint8)


class _PackedLinear(torch.autograd.Function):
    """x @ W^T with W in MXFP4 and frozen. The gradient of x needs W alone, so nothing but the packed bytes is saved."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, scales)
        return inputs @ dequantize(blocks, scales, inputs.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        blocks, scales = ctx.saved_tensors
        return grad_output @ dequantize(blocks, scales, grad_output.dtype), None, None


class PackedExperts(nn.Module):
    """Drop-in for `GptOssExperts` whose projections stay in MXFP4: one expert at a time is dequantized, in forward and
    again in backward. Gradients reach the hidden states and the routing weights; the experts themselves are frozen.

    Its `state_dict` has the names and shapes of the official checkpoints.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        *,
        alpha: float,
        limit: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.limit = limit
        self._register("gate_up_proj", experts, 2 * intermediate, hidden, dtype)
        self._register("down_proj", experts, hidden, intermediate, dtype)

    def _register(self, name: str, experts: int, width_out: int, width_in: int, dtype: torch.dtype | None) -> None:
        if width_in % BLOCK:
            raise ModelError(
                f"MXFP4 holds blocks of {BLOCK} weights, and the experts' {name} takes {width_in} inputs. Make "
                f"hidden_size and intermediate_size multiples of {BLOCK}."
            )
        shape = (experts, width_out, width_in // BLOCK)
        self.register_buffer(f"{name}_blocks", torch.empty(*shape, BLOCK // 2, dtype=torch.uint8))
        self.register_buffer(f"{name}_scales", torch.empty(shape, dtype=torch.uint8))
        bias = torch.empty(experts, width_out, dtype=dtype)
        self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))

    @classmethod
    def like(cls, dense: GptOssExperts) -> Self:
        """Uninitialised, of the shape and activation of `dense`, on the current default device."""
        experts, hidden, doubled = dense.gate_up_proj.shape
        dtype = dense.gate_up_proj_bias.dtype
        return cls(experts, hidden, doubled // 2, alpha=dense.alpha, limit=dense.limit, dtype=dtype)

    @classmethod
    def from_dense(cls, dense: GptOssExperts) -> Self:
        """The experts of `dense`, rounded to MXFP4."""
        packed = cls.like(dense)
        for name in ("gate_up_proj", "down_proj"):
            blocks, scales = quantize(getattr(dense, name).detach().transpose(1, 2))
            setattr(packed, f"{name}_blocks", blocks)
            setattr(packed, f"{name}_scales", scales)
            getattr(packed, f"{name}_bias").data = getattr(dense, f"{name}_bias").detach().clone()
        return packed

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """Mix each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            router_indices: [tokens, top_k] int64.
            routing_weights: [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        mixed = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            token, slot = torch.where(router_indices == expert)
            gate_up = self._project("gate_up_proj", expert, hidden_states[token])
            output = self._project("down_proj", expert, self._activate(gate_up))
            weighted = output * routing_weights[token, slot, None]
            mixed.index_add_(0, token, weighted.to(mixed.dtype))
        return mixed

    def _project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        parts: list[Tensor] = [getattr(self, f"{name}_{part}")[expert] for part in ("blocks", "scales", "bias")]
        blocks, scales, bias = parts
        return _PackedLinear.apply(inputs, blocks, scales) + bias

    def _activate(self, gate_up: Tensor) -> Tensor:
        """The clamped SwiGLU of GPT-OSS; gate and up are interleaved columns."""
        gate = gate_up[..., 0::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def extra_repr(self) -> str:
        experts, doubled, groups = self.get_buffer("gate_up_proj_scales").shape
        return f"experts={experts}, hidden={groups * BLOCK}, intermediate={doubled // 2}, MXFP4"
