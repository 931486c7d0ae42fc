"""Packed experts against dense ones of the same values, and one module that knows the class of the dense ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import BASES
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from d2l.base.experts import (
    PackedExperts,
    compute_experts_eagerly,
    empty_packed_experts,
    expert_projections,
    pack_experts,
    round_experts,
)
from d2l.base.mxfp4 import dequantize, quantize
from d2l.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 23, 6, 2, 64, 96


def test_one_module_knows_the_experts_of_transformers() -> None:
    sources = [path for room in ("d2l", "checks", "commands") for path in (ROOT / room).rglob("*.py")]
    knowing = [
        path.relative_to(ROOT).as_posix()
        for path in [*sources, ROOT / "cli.py"]
        if any(word in path.read_text(encoding="utf-8") for word in ("GptOssExperts", "models.gpt_oss"))
    ]
    assert knowing == ["d2l/base/experts.py"]


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


def tiny_gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=16,
        num_local_experts=3,
        num_experts_per_tok=1,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def test_packed_and_rounded_experts_of_a_model_hold_the_same_values() -> None:
    packed, rounded = tiny_gpt_oss(), tiny_gpt_oss()
    rounded.load_state_dict(packed.state_dict())
    assert len(expert_projections(rounded)) == 2 * 2
    before = [projection.clone() for projection in expert_projections(rounded)]
    found = pack_experts(packed)
    round_experts(rounded)
    assert [layer.mlp.experts for layer in packed.model.layers] == found
    assert expert_projections(packed) == []
    for layer, experts in enumerate(found):
        for name, dense in zip(("gate_up_proj", "down_proj"), expert_projections(rounded)[2 * layer :], strict=False):
            parts = (experts.get_buffer(f"{name}_{part}") for part in ("blocks", "scales"))
            assert dense.equal(dequantize(*parts, torch.float32).transpose(1, 2))
    assert not any(one.equal(other) for one, other in zip(before, expert_projections(rounded), strict=True))


def test_empty_experts_take_no_memory_and_the_place_of_dense_ones() -> None:
    model = tiny_gpt_oss()
    shapes = {name: x.shape for name, x in pack_experts(tiny_gpt_oss())[0].state_dict().items()}
    empty_packed_experts(model)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert {name: x.shape for name, x in experts.state_dict().items()} == shapes
    assert all(x.is_meta for x in experts.state_dict().values())


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe", "llama"])
def test_experts_of_every_family_are_computed_one_by_one(family: str) -> None:
    """Batched products are slower on a CPU, and take no float64, which checks compute in; without experts nothing happens."""
    model = AutoModelForCausalLM.from_config(BASES[family].tiny())
    compute_experts_eagerly(model)
    assert model.config._experts_implementation == "eager"
    assert model.double()(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
