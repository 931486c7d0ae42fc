"""A twin is of its model's kind in everything that decides which code runs, and tiny."""

from typing import Any

import pytest
import torch
from support.families import BASES, UNSHIPPED
from support.sizes import MXFP4, NO_SPECIAL_TOKENS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from checks.production import make_subject
from checks.training.steps import light_model
from d2l.base.config import quantization_method, read_base_config, skeleton
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.base.masks import attention_layout, packed_masks
from d2l.base.twin import TWIN_CANNOT_SHOW, WINDOW, twin_config
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.errors import ModelError

every_model_type = pytest.mark.parametrize("model_type", [*BASES, *UNSHIPPED])


def family(model_type: str) -> PreTrainedConfig:
    return read_base_config("openai/gpt-oss-20b") if model_type == "gpt_oss" else AutoConfig.for_model(model_type)


def module_kinds(config: PreTrainedConfig) -> set[str]:
    return {type(module).__name__ for module in skeleton(config).modules()}


def biased_linears(config: PreTrainedConfig) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in skeleton(config).named_modules()
        if getattr(module, "bias", None) is not None
    }


@every_model_type
def test_what_decides_which_code_runs_stays(model_type: str) -> None:
    real = family(model_type)
    twin = twin_config(real)
    assert type(twin) is type(real)
    assert module_kinds(twin) == module_kinds(real)
    assert biased_linears(twin) == biased_linears(real)
    assert quantization_method(twin) == quantization_method(real)
    for name in ("tie_word_embeddings", "num_experts_per_tok", "hidden_act", "rms_norm_eps"):
        assert getattr(twin, name, None) == getattr(real, name, None), name
    rope, real_rope = getattr(twin, "rope_parameters", None) or {}, getattr(real, "rope_parameters", None) or {}
    assert rope.keys() == real_rope.keys()
    assert rope.get("rope_type") == real_rope.get("rope_type")
    assert rope.get("factor") == real_rope.get("factor")
    layout, real_layout = attention_layout(twin), attention_layout(real)
    assert layout.kinds == real_layout.kinds
    assert layout.layer_types == real_layout.layer_types[: len(layout.layer_types)]
    assert len(layout.layer_types) >= 4
    assert (layout.window is None) == (real_layout.window is None)
    ratio = twin.num_attention_heads // (getattr(twin, "num_key_value_heads", None) or twin.num_attention_heads)
    assert ratio == real.num_attention_heads // (getattr(real, "num_key_value_heads", None) or real.num_attention_heads)


@every_model_type
def test_a_twin_is_tiny_and_quick_and_its_effects_are_of_order_one(model_type: str) -> None:
    twin = twin_config(family(model_type))
    config = RunConfig(dtype="float32")
    base = random_base(twin, plan_load(config, twin, "cpu"), seed=0)
    assert sum(tensor.numel() for tensor in (*base.parameters(), *base.buffers())) < 2_000_000
    input_ids = torch.randint(twin.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(40)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        logits = base(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=packed_masks(base, position_ids),
            use_cache=False,
        ).logits
    assert 0.3 < logits.std() < 5
    assert operations.get_total_flops() < 100_000_000  # some milliseconds of one thread, counted instead of timed


def test_gpt_oss_in_numbers() -> None:
    twin = twin_config(family("gpt_oss"))
    assert (twin.num_hidden_layers, twin.layer_types) == (4, ["sliding_attention", "full_attention"] * 2)
    assert (twin.num_attention_heads, twin.num_key_value_heads, twin.head_dim) == (16, 2, 16)
    assert (twin.num_local_experts, twin.num_experts_per_tok) == (8, 4)
    assert twin.hidden_size % 32 == 0
    assert twin.intermediate_size % 32 == 0
    assert len({twin.hidden_size, twin.intermediate_size, 2 * twin.intermediate_size}) == 3  # any transpose shows
    assert (twin.sliding_window, twin.vocab_size) == (WINDOW, 128)
    assert twin.rope_parameters["rope_type"] == "yarn"
    assert twin.max_position_embeddings == 32 * twin.rope_parameters["original_max_position_embeddings"]


def heads_add_up(config: PreTrainedConfig) -> bool:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim == config.hidden_size


HEAD_COUNTS = [(heads, shared) for heads in range(1, 65) for shared in range(1, heads + 1) if heads % shared == 0]
# name → model_type, and what tells the family's heads; one that has no field for a head's size takes its share
ANY_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, heads of another size": ("llama", {"head_dim": 48}),
    "qwen2, no field for a head's size": ("qwen2", {}),
    "gpt_oss in MXFP4": ("gpt_oss", {"head_dim": 128, **MXFP4}),
}
REST = ("qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt_oss")
SLOW_HEADS = {
    "phi3": ("phi3", {}),
    "llama": ("llama", {"head_dim": 128}),
    "gpt_oss in MXFP4, heads of another size": ("gpt_oss", {"head_dim": 48, **MXFP4}),
} | {f"{name}, heads of {size}": (name, {"head_dim": size}) for name in REST for size in (128, 48)}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        *(pytest.param(*entry, id=name) for name, entry in ANY_HEADS.items()),
        *(pytest.param(*entry, id=name, marks=pytest.mark.slow) for name, entry in SLOW_HEADS.items()),
    ],
)
def test_a_twin_of_any_number_of_heads_runs(model_type: str, settings: dict[str, Any]) -> None:
    """Every number of query heads up to 64 with each of its divisors as key-value heads; each different twin runs once."""
    twins: dict[tuple[int, ...], PreTrainedConfig] = {}
    for heads, key_value_heads in HEAD_COUNTS:
        sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "hidden_size": 128 * heads}
        real = AutoConfig.for_model(model_type, **NO_SPECIAL_TOKENS | sizes | settings)
        twin = twin_config(real)
        kept, kept_key_value = twin.num_attention_heads, twin.num_key_value_heads
        assert (kept // kept_key_value, kept_key_value) == (min(8, heads // key_value_heads), min(2, key_value_heads))
        assert heads_add_up(twin) == heads_add_up(real) == (settings.get("head_dim") != 48)
        assert twin.hidden_size not in (twin.intermediate_size, 2 * twin.intermediate_size)
        assert "quantization_config" not in settings or twin.hidden_size % 32 == twin.intermediate_size % 32 == 0
        twins[kept, kept_key_value] = twin
    assert len(twins) == 16
    for twin in twins.values():
        base = random_base(twin, plan_load(RunConfig(attn_implementation="eager"), twin, device="cpu"), seed=0)
        with torch.no_grad():
            assert 0.2 < base(torch.arange(20)[None]).logits.std() < 5


def test_a_part_of_a_head_that_rope_turns_stays_whole() -> None:
    """Phi-4-mini: 24 heads, 8 of keys and values, and rope on three quarters of a head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    sizes = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8}
    twin = twin_config(AutoConfig.for_model("phi3", rope_parameters=rope, **sizes))
    base = random_base(twin, plan_load(RunConfig(), twin, "cpu"), seed=0)
    assert base(torch.arange(20)[None]).logits.isfinite().all()


def test_heads_that_cannot_be_shared_are_refused_and_not_hidden() -> None:
    real = AutoConfig.for_model("qwen3", num_attention_heads=5, num_key_value_heads=2)
    with pytest.raises(ModelError, match=r"num_attention_heads \(5\) is no multiple of num_key_value_heads \(2\)"):
        twin_config(real)


def test_every_layer_type_is_in_the_twin() -> None:
    late = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, layer_types=["sliding_attention"] * 8 + ["full_attention"] * 4
    )
    assert twin_config(late).layer_types == ["sliding_attention"] * 8 + ["full_attention"]
    shallow = AutoConfig.for_model("llama", num_hidden_layers=2)
    assert twin_config(shallow).num_hidden_layers == 2


def test_longrope_keeps_one_factor_for_each_rotated_pair() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    real = AutoConfig.for_model(
        "phi3", rope_parameters=rope, max_position_embeddings=131072, original_max_position_embeddings=4096
    )
    twin = twin_config(real)
    rotated = twin.hidden_size // twin.num_attention_heads
    assert len(twin.rope_parameters["long_factor"]) == rotated // 2
    random_base(twin, plan_load(RunConfig(), twin, "cpu"), seed=0)


def test_a_config_that_cannot_be_shrunk_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(values: dict) -> PreTrainedConfig:
        raise ValueError(f"hidden_size must not be {values['hidden_size']}")

    monkeypatch.setattr(LlamaConfig, "from_dict", refuse)
    with pytest.raises(ModelError, match="model_type llama: hidden_size must not be 64"):
        twin_config(LlamaConfig())


def test_limits_are_stated() -> None:
    assert all(any(word in line for line in TWIN_CANNOT_SHOW) for word in ("memory", "bfloat16", "CUDA"))


def test_the_light_twin_has_matrices_for_both_ways_of_muon() -> None:
    """One whose sides are as 1 to 2 or more is orthogonalized by its Gram matrix; one iteration too few went unseen once."""
    matrices = [it.shape[-2:] for it in light_model(make_subject(load_config())).hypernet.parameters() if it.dim() > 1]
    long = [max(shape) >= 2 * min(shape) for shape in matrices if min(shape) > 2]
    assert True in long
    assert False in long
