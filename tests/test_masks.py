"""Documents packed into one row behave as if each were alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import BASES, default_config
from support.sizes import ALTERNATING, WINDOW
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from d2l.base.attention import PER_DOCUMENT
from d2l.base.flex import PACKED_FLEX
from d2l.base.load_plan import plan_load
from d2l.base.masks import attention_layout, packed_masks
from d2l.config.schema import RunConfig
from d2l.errors import ModelError

LENGTHS = (11, 1, 9)  # documents longer than the window, and one of a single token
MIXED = ALTERNATING["layer_types"]
# Kinds of attention that no family of the table has, beside all that it has: (model_type, fields)
OTHER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_mixed": ("qwen3", {"use_sliding_window": True, **ALTERNATING}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
}


def config(kind: str) -> PreTrainedConfig:
    model_type, fields = OTHER_KINDS.get(kind, (kind, {}))
    return BASES[model_type].tiny(**fields)


def implementations(kind: str) -> list[str]:
    """Every attention implementation that can train such a model on a CPU."""
    planned = plan_load(RunConfig(), config(kind), "cpu").attention.value
    return list(dict.fromkeys(["eager", planned, PER_DOCUMENT, PACKED_FLEX]))


CASES = [(kind, attention) for kind in (*BASES, *OTHER_KINDS) for attention in implementations(kind)]


def model(kind: str, attention: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config(kind), attn_implementation=attention).eval()


def positions(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@torch.no_grad()
def logits(base: PreTrainedModel, input_ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    position_ids = positions(lengths)
    masks = packed_masks(base, position_ids)
    return base(input_ids=input_ids, position_ids=position_ids, attention_mask=masks, use_cache=False).logits[0]


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_packed_document_neither_sees_another_nor_differs_from_itself_alone(kind: str, attention: str) -> None:
    base = model(kind, attention)
    input_ids = torch.randint(64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    packed = logits(base, input_ids, LENGTHS)
    for index, length in enumerate(LENGTHS):
        start = sum(LENGTHS[:index])
        own = slice(start, start + length)
        edited = torch.randint(64, input_ids.shape, generator=torch.Generator().manual_seed(2 + index))
        edited[:, own] = input_ids[:, own]
        torch.testing.assert_close(logits(base, edited, LENGTHS)[own], packed[own], atol=1e-6, rtol=0)
        # alone, the model builds its own masks: an independent opinion on the window
        alone = base(input_ids=input_ids[:, own], use_cache=False).logits[0].detach()
        torch.testing.assert_close(packed[own], alone, atol=2e-5, rtol=1e-5)


def test_gpt_oss_leaks_without_our_masks() -> None:
    """The fault that the test above must be able to see: the model's own masks ignore `position_ids`."""
    base = model("gpt_oss", "eager")
    input_ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(1))
    edited = torch.cat([63 - input_ids[:, :11], input_ids[:, 11:]], dim=1)
    arguments = {"position_ids": positions((11, 9)), "use_cache": False}
    with torch.no_grad():
        first, second = (base(input_ids=ids, **arguments).logits[0, 11:] for ids in (input_ids, edited))
    assert (first - second).abs().max() > 0.1


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.sampled_from(["eager", "sdpa"]), st.integers(1, 5))
def test_masks_agree_with_a_loop_over_pairs(lengths: list[int], attention: str, window: int) -> None:
    small = BASES["qwen3"].tiny(use_sliding_window=True, sliding_window=window, layer_types=MIXED)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(small, attn_implementation=attention)
    masks = packed_masks(base, positions(tuple(lengths)))
    assert isinstance(masks, dict)
    documents = [document for document, length in enumerate(lengths) for _ in range(length)]
    for kind, reach in (("full_attention", len(documents)), ("sliding_attention", window)):
        expected = torch.tensor(
            [
                [documents[i] == documents[j] and j <= i and i - j < reach for j in range(len(documents))]
                for i in range(len(documents))
            ]
        )
        mask = masks[kind]
        if mask is None:  # sdpa's own causal attention
            allowed = torch.ones_like(expected).tril()
        elif attention == "sdpa":
            allowed = mask[0, 0]
        else:
            allowed = mask[0, 0] == 0
            assert torch.equal(mask[0, 0][~allowed], torch.full_like(mask[0, 0][~allowed], torch.finfo(mask.dtype).min))
        assert torch.equal(allowed, expected), kind


@pytest.mark.parametrize(
    ("kind", "kinds", "window"),
    [
        ("gpt_oss", ("sliding_attention", "full_attention"), WINDOW),
        ("llama", ("full_attention",), None),
        ("qwen3", ("full_attention",), None),
        ("mistral_window", ("sliding_attention",), WINDOW),
        ("gemma3_text", ("sliding_attention", "full_attention"), WINDOW),
    ],
)
def test_layout(kind: str, kinds: tuple[str, ...], window: int | None) -> None:
    layout = attention_layout(config(kind))
    assert (layout.kinds, layout.window, len(layout.layer_types)) == (kinds, window, 4)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "linear_attention"),
        ("mamba", "layers of type"),
        ("llama4_text", "chunked_attention"),
        ("rwkv", "no attention to mask"),
        ("bloom", "takes no position_ids"),
        ("blt", "has no single stack of num_hidden_layers"),
        ("gemma3", "multimodal"),
        ("musicgen", "multimodal"),
        ("phi4_multimodal", "multimodal"),
        ("t5", "not a causal language model"),
    ],
)
def test_layouts_that_no_mask_can_separate_are_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refusal:
        attention_layout(default_config(model_type))
    assert model_type in str(refusal.value)


def test_bidirectional_attention_is_refused() -> None:
    both_ways = BASES["gemma3_text"].tiny(use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="later tokens"):
        attention_layout(both_ways)
