"""Bytes computed from shapes against bytes counted."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from support.families import BASES
from support.sizes import MXFP4
from transformers import PreTrainedConfig

from d2l.base.load import plan_load, random_base, read_base_config
from d2l.base.masks import packed_masks
from d2l.base.memory import MemoryPlan, count_weights, memory_plan
from d2l.base.twin import twin_config
from d2l.config.schema import RunConfig

GPT_OSS = read_base_config("openai/gpt-oss-20b")
GB = 10**9


def computed(base_config: PreTrainedConfig, label_tokens: int | None = None, **values: object) -> MemoryPlan:
    config = RunConfig(**{"max_packed_inp_len": 1024, "max_packed_ctx_len": 1024, **values})
    choices = plan_load(config, base_config, "cpu")
    return memory_plan(
        config,
        base_config,
        choices,
        hypernet_parameters=1_000_000,
        optimizer_values=2_000_000,
        label_tokens=label_tokens,
    )


def component(memory: MemoryPlan, name: str):
    return next(component for component in memory.components if component.name == name)


def test_gpt_oss_20b_has_the_published_number_of_weights() -> None:
    weights = count_weights(GPT_OSS)
    assert weights.total == 20_914_757_184  # 20.91B
    assert weights.experts == 24 * 32 * (2880 * 5760 + 2880 * 2880)
    assert weights.largest_tensor == 201_088 * 2880


def test_gpt_oss_20b_takes_42_gb_dequantized_and_a_third_packed() -> None:
    dequantized = component(computed(GPT_OSS, expert_weights="dequantize", dtype="bfloat16"), "base weights")
    packed = component(computed(GPT_OSS, expert_weights="packed", dtype="bfloat16"), "base weights")
    assert dequantized.steady == 2 * 20_914_757_184
    assert 41 * GB < dequantized.steady < 43 * GB
    assert 13 * GB < packed.steady < 14 * GB  # 12.8 GiB


@pytest.mark.parametrize("experts", ["packed", "dequantize"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_are_the_bytes_of_the_base(experts: str, dtype: str) -> None:
    twin = twin_config(GPT_OSS)
    config = RunConfig(expert_weights=experts, dtype=dtype)
    state = random_base(twin, plan_load(config, twin, "cpu"), 0).state_dict()
    counted = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    assert component(computed(twin, expert_weights=experts, dtype=dtype), "base weights").steady == counted


def kept_for_backward(base_config: PreTrainedConfig, tokens: int, attention: str) -> int:
    """Bytes of what autograd saves in a forward, weights and masks aside."""
    config = RunConfig(attn_implementation=attention)
    base = random_base(base_config, plan_load(config, base_config, "cpu"), 0)
    position_ids = torch.arange(tokens)[None]
    masks = packed_masks(base, position_ids)
    given: Iterable = masks.values() if isinstance(masks, dict) else [masks]
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*base.parameters(), *base.buffers(), *given)
        if tensor is not None
    }
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    embeddings = torch.randn(1, tokens, base_config.hidden_size, requires_grad=True)
    arguments = {"position_ids": position_ids, "attention_mask": masks, "use_cache": False, "logits_to_keep": 1}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = base(inputs_embeds=embeddings, **arguments)
    assert output.logits.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


# Wide enough that what a layer keeps outweighs what does not grow with the width.
WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 8, "head_dim": 32}


@pytest.mark.parametrize(
    ("base_config", "attention"),
    [
        (BASES["gpt_oss"].tiny(**WIDE, **MXFP4, num_local_experts=8), "eager"),
        (BASES["llama"].tiny(**WIDE), "sdpa"),
        (BASES["llama"].tiny(**WIDE), "eager"),
        (BASES["qwen3"].tiny(**WIDE), "sdpa"),
    ],
    ids=["gpt_oss-eager", "llama-sdpa", "llama-eager", "qwen3-sdpa"],
)
@pytest.mark.parametrize("tokens", [64, 256])
def test_activations_are_within_a_factor_of_what_autograd_keeps(base_config, attention: str, tokens: int) -> None:
    memory = computed(
        base_config,
        attn_implementation=attention,
        gradient_checkpointing=False,
        max_packed_inp_len=tokens,
        max_packed_ctx_len=1,
    )
    at_work = 4 * (4 * 8 * tokens**2 if attention == "eager" else 0)  # copies of the scores that backward does not need
    unpacked = 4 * 3 * 160 * 128 if base_config.model_type == "gpt_oss" else 0  # one expert
    peak = component(memory, "base activations").peak - at_work - unpacked
    assert 1 / 1.5 < peak / kept_for_backward(base_config, tokens, attention) < 1.5


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    on, off = (
        component(computed(GPT_OSS, dtype="bfloat16", gradient_checkpointing=switch), "base activations").peak
        for switch in (True, False)
    )
    assert off > 5 * on


@pytest.mark.parametrize(("transient", "dequantized"), [(2**29, 2**29), (2**31, 32 * 2 * 2880 * 2880 * 2)])
def test_a_layer_of_experts_at_once_takes_its_transient_and_no_more_than_its_gates_and_ups(
    transient: int, dequantized: int
) -> None:
    config = RunConfig(max_packed_inp_len=1024, max_packed_ctx_len=1024, dtype="bfloat16")
    one_by_one = plan_load(config, GPT_OSS, "cpu")
    products = replace(one_by_one.expert_products, value="grouped")
    at_once = replace(one_by_one, expert_products=products, expert_transient_bytes=transient)
    peaks = [
        memory_plan(config, GPT_OSS, plan, hypernet_parameters=1, optimizer_values=2).peak
        for plan in (at_once, one_by_one)
    ]
    assert peaks[0] - peaks[1] == dequantized - 3 * 2880 * 2880 * 2


def test_logits_grow_with_the_label_tokens_only() -> None:
    few, all_of_them = (component(computed(GPT_OSS, label_tokens=count), "logits").peak for count in (64, None))
    assert all_of_them == 16 * few
    assert few == 64 * 201_088 * (4 + 12)


def test_there_is_one_copy_of_the_base_and_adamw_costs_sixteen_bytes_a_parameter() -> None:
    memory = computed(GPT_OSS)
    assert component(memory, "context encoder").peak == 0
    trained = [component(memory, name) for name in ("hypernetwork", "gradients", "optimizer states")]
    assert [sum(getattr(part, phase) for part in trained) for phase in ("loading", "peak", "steady")] == [
        4_000_000,
        16_000_000,
        12_000_000,
    ]


def test_totals_are_sums_and_a_long_context_shows() -> None:
    memory = computed(GPT_OSS, dtype="bfloat16")
    for phase in ("loading", "peak", "steady"):
        assert getattr(memory, phase) == sum(getattr(part, phase) for part in memory.components)
    assert memory.steady < memory.peak
    long = computed(GPT_OSS, dtype="bfloat16", max_packed_ctx_len=32768)
    assert long.peak > 140 * GB  # eager attention is quadratic: does not fit an H200
    assert computed(GPT_OSS, dtype="bfloat16", expert_weights="dequantize").loading > 45 * GB
