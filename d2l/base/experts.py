"""The experts of GPT-OSS, and the only module that knows their class in transformers.

`PackedExperts` stay in MXFP4 while gradients pass through to the inputs. The functions find a model's dense experts and
put packed ones in their place, round them, or choose what computes them.
"""

from collections.abc import Iterator
from math import ceil
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from d2l.base.grouped import Projection, Settings, grouped_experts, smallest_transient
from d2l.base.mxfp4 import BLOCK, dequantize, quantize
from d2l.base.swiglu import clamped_swiglu
from d2l.errors import ModelError

_PROJECTIONS = ("gate_up_proj", "down_proj")  # what MXFP4 holds of experts; their biases stay as they are


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


def _project(projection: Projection, expert: int, inputs: Tensor) -> Tensor:
    blocks, scales, bias = (part[expert] for part in projection)
    output: Tensor = _PackedLinear.apply(inputs, blocks, scales) + bias
    return output


class PackedExperts(nn.Module):
    """Drop-in for `GptOssExperts` whose projections stay in MXFP4.

    They are dequantized in forward and again in backward: one expert at a time, or where `transient_bytes` is set, all
    experts of the layer at once in slices of so many bytes. Gradients reach the hidden states and the routing weights; the
    experts themselves are frozen.

    Its `state_dict` has the names and shapes of the official checkpoints.
    """

    transient_bytes: int | None = None

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
        """Make uninitialised experts of the shape and activation of `dense`, on the current default device."""
        experts, hidden, doubled = dense.gate_up_proj.shape
        dtype = dense.gate_up_proj_bias.dtype
        return cls(experts, hidden, doubled // 2, alpha=dense.alpha, limit=dense.limit, dtype=dtype)

    @classmethod
    def from_dense(cls, dense: GptOssExperts) -> Self:
        """Round the experts of `dense` to MXFP4."""
        packed = cls.like(dense)
        for name in _PROJECTIONS:
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
        gate_up_proj, down_proj = self._projection("gate_up_proj"), self._projection("down_proj")
        if self.transient_bytes is not None:
            settings = Settings(self.alpha, self.limit, self.transient_bytes)
            return grouped_experts(hidden_states, router_indices, routing_weights, gate_up_proj, down_proj, settings)
        mixed = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            token, slot = torch.where(router_indices == expert)
            gate_up = _project(gate_up_proj, expert, hidden_states[token])
            output = _project(down_proj, expert, self._activate(gate_up))
            weighted = output * routing_weights[token, slot, None]
            mixed.index_add_(0, token, weighted.to(mixed.dtype))
        return mixed

    def _projection(self, name: str) -> Projection:
        return Projection(*(getattr(self, f"{name}_{part}") for part in ("blocks", "scales", "bias")))

    def _activate(self, gate_up: Tensor) -> Tensor:
        """Apply the clamped SwiGLU; gate and up are interleaved columns."""
        return clamped_swiglu(gate_up[..., 0::2], gate_up[..., 1::2], self.alpha, self.limit)

    def extra_repr(self) -> str:
        experts, doubled, groups = self.get_buffer("gate_up_proj_scales").shape
        return f"experts={experts}, hidden={groups * BLOCK}, intermediate={doubled // 2}, MXFP4"


def pack_experts(model: PreTrainedModel) -> list[PackedExperts]:
    """Put packed experts, rounded to MXFP4, in the place of all dense ones, and return them."""
    packed = []
    for name, dense in _dense_experts(model):
        packed.append(PackedExperts.from_dense(dense))
        model.set_submodule(name, packed[-1])
    return packed


def empty_packed_experts(model: PreTrainedModel) -> None:
    """Put packed experts without values, on the meta device, in the place of all dense ones."""
    for name, dense in _dense_experts(model):
        with torch.device("meta"):
            model.set_submodule(name, PackedExperts.like(dense))


def group_packed_experts(model: PreTrainedModel, transient_bytes: int, dtype: torch.dtype) -> None:
    """Compute all packed experts of a layer at once, with at most so many bytes of dequantized weights at a time.

    Raises:
        ModelError: the smallest slice of this model's weights, in `dtype`, is larger.
    """
    for module in model.modules():
        if isinstance(module, PackedExperts):
            experts, hidden, groups = module.get_buffer("down_proj_scales").shape
            least = smallest_transient(experts, hidden, groups * BLOCK, dtype)
            if transient_bytes < least:
                raise ModelError(
                    f"expert_transient_gib: {transient_bytes / 2**30:g} does not hold {BLOCK} columns of the gate and up "
                    f"projections of {experts} experts, which are dequantized at a time. Set it to "
                    f"{ceil(least / 2**20) / 1024:g} or more."
                )
            module.transient_bytes = transient_bytes


def round_experts(model: PreTrainedModel) -> None:
    """Round all dense experts to values that MXFP4 holds."""
    for _, dense in _dense_experts(model):
        packed = PackedExperts.from_dense(dense)
        for name in _PROJECTIONS:
            parameter: nn.Parameter = getattr(dense, name)
            blocks, scales = packed.get_buffer(f"{name}_blocks"), packed.get_buffer(f"{name}_scales")
            parameter.data = dequantize(blocks, scales, parameter.dtype).transpose(1, 2).contiguous()


def compute_experts_eagerly(model: PreTrainedModel) -> None:
    """Compute experts of whatever family one by one: on a CPU, batched products of all of them are ten times slower."""
    model.set_experts_implementation("eager")


def expert_projections(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of all dense experts that MXFP4 can hold: the projections, not their biases."""
    return [getattr(dense, name) for _, dense in _dense_experts(model) for name in _PROJECTIONS]


def _dense_experts(model: PreTrainedModel) -> Iterator[tuple[str, GptOssExperts]]:
    """Find the layers of dense experts, with their names."""
    return ((name, it) for name, it in list(model.named_modules()) if isinstance(it, GptOssExperts))
