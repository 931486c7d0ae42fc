"""The MXFP4 codec against a loop, and packed experts against dense ones of the same values."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from d2l.base.mxfp4 import PackedExperts, dequantize, quantize
from d2l.errors import ModelError

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 23, 6, 2, 64, 96


def decode_by_hand(blocks: torch.Tensor, scales: torch.Tensor) -> list[float]:
    """One row: blocks [groups, 16], scales [groups]."""
    values = []
    for block, scale in zip(blocks.tolist(), scales.tolist(), strict=True):
        for byte in block:
            values += [E2M1[byte % 16] * 2.0 ** (scale - 127), E2M1[byte // 16] * 2.0 ** (scale - 127)]
    return values


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 255), min_size=48, max_size=48), st.lists(st.integers(0, 252), min_size=3, max_size=3))
def test_every_byte_decodes_exactly(block_bytes: list[int], scale_bytes: list[int]) -> None:
    blocks = torch.tensor(block_bytes, dtype=torch.uint8).view(3, 16)
    scales = torch.tensor(scale_bytes, dtype=torch.uint8)
    expected = torch.tensor(decode_by_hand(blocks, scales), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        decoded = dequantize(blocks, scales, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded.double(), expected)
        assert torch.equal(decoded.signbit(), expected.signbit())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32))
def test_quantize_takes_the_nearest_value_of_the_scale(weights: list[float]) -> None:
    blocks, scales = quantize(torch.tensor(weights))
    largest = max(map(abs, weights))
    if largest > 2.0**-120:
        assert scales.item() - 127 == math.floor(math.log2(largest)) - 2
    unit = 2.0 ** (scales.item() - 127)
    for weight, decoded in zip(weights, dequantize(blocks, scales, torch.float64).tolist(), strict=True):
        nearest = min(abs(weight - value * unit) for value in E2M1)
        assert abs(weight - decoded) == pytest.approx(nearest, rel=1e-6)


def test_ties_go_to_the_even_code() -> None:
    """Midpoints of the eight magnitudes; the 6 fixes the scale at 1."""
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([6.0, *midpoints, *(-value for value in midpoints), *[0.0] * 17])
    decoded = dequantize(*quantize(row), torch.float32)[1:15].tolist()
    evens = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert decoded == [*evens, *(-value for value in evens)]


def test_what_mxfp4_can_hold_survives_the_round_trip() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (5, 3, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(20, 230, (5, 3, 4), generator=generator, dtype=torch.uint8)
    weights = dequantize(blocks, scales, torch.float32)
    assert torch.equal(dequantize(*quantize(weights), torch.float32), weights)


def pair_of_experts(dtype: torch.dtype) -> tuple[GptOssExperts, PackedExperts]:
    """Dense experts whose weights MXFP4 holds exactly, and the same ones packed."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
    dense = GptOssExperts(GptOssConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in dense.named_parameters():
        noise = 0.4 * torch.randn(parameter.shape, generator=generator)
        if not name.endswith("_bias"):
            noise = dequantize(*quantize(noise.transpose(1, 2)), torch.float32).transpose(1, 2).contiguous()
        parameter.data = noise.to(dtype)
    return dense.requires_grad_(False), PackedExperts.from_dense(dense)


def routed(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """hidden_states, router_indices, routing_weights; expert 5 gets no token."""
    generator = torch.Generator().manual_seed(1)
    yield torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    yield torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    yield torch.rand(TOKENS, TOP_K, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_packed_experts_equal_dense_ones_in_output_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    results = []
    for experts in pair_of_experts(dtype):
        hidden, indices, weights = routed(dtype)
        output = experts(hidden, indices, weights)
        direction = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        results.append((output.detach(), *torch.autograd.grad(output, (hidden, weights), direction)))
    for dense, packed in zip(*results, strict=True):
        assert packed.dtype == dtype
        assert (dense - packed).norm() <= tolerance * dense.norm()


def test_checkpointing_does_not_change_the_gradient() -> None:
    _, experts = pair_of_experts(torch.float32)
    gradients = []
    for wrapped in (experts, lambda *inputs: checkpoint(experts, *inputs, use_reentrant=False)):
        hidden, indices, weights = routed(torch.float32)
        gradients.append(torch.autograd.grad(wrapped(hidden, indices, weights).square().sum(), (hidden, weights)))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_nothing_unpacked_is_kept_for_backward() -> None:
    """Autograd holds the packed bytes themselves, not a copy, and no matrix the size of a weight."""
    _, experts = pair_of_experts(torch.float32)
    packed = {buffer.untyped_storage().data_ptr() for buffer in experts.buffers()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(*routed(torch.float32))
    assert any(tensor.dtype == torch.uint8 for tensor in saved)
    for tensor in saved:
        if tensor.dtype == torch.uint8:
            assert tensor.untyped_storage().data_ptr() in packed
        else:
            assert tensor.shape[-2:] not in {
                (HIDDEN, 2 * INTERMEDIATE),
                (2 * INTERMEDIATE, HIDDEN),
                (HIDDEN, INTERMEDIATE),
            }


def test_experts_take_the_official_names_and_shapes() -> None:
    _, experts = pair_of_experts(torch.bfloat16)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in experts.state_dict().items()}
    assert layout == {
        "gate_up_proj_blocks": ((EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32, 16), torch.uint8),
        "gate_up_proj_scales": ((EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32), torch.uint8),
        "gate_up_proj_bias": ((EXPERTS, 2 * INTERMEDIATE), torch.bfloat16),
        "down_proj_blocks": ((EXPERTS, HIDDEN, INTERMEDIATE // 32, 16), torch.uint8),
        "down_proj_scales": ((EXPERTS, HIDDEN, INTERMEDIATE // 32), torch.uint8),
        "down_proj_bias": ((EXPERTS, HIDDEN), torch.bfloat16),
    }
    assert not any(parameter.requires_grad for parameter in experts.parameters())


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 32"):
        PackedExperts(2, 48, 64, alpha=1.7, limit=7.0)
