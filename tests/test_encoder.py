"""The context encoder against the hidden states that transformers itself reports, and what it leaves behind: nothing."""

import gc
import weakref
from typing import Any

import pytest
import torch
from support.families import BASES
from support.sizes import BASE, LAYERS, VOCABULARY
from support.tiny_model import tiny_base
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig, PreTrainedConfig, PreTrainedModel

from d2l.base.masks import packed_masks
from d2l.errors import ModelError
from d2l.hypernet.encoder import ContextEncoder, EncoderType
from d2l.hypernet.model import checkpoint_layers

LENGTHS = (7, 3, 9)  # of the packed documents; longer than the sliding window of 4
TYPES: tuple[tuple[EncoderType, int | None], ...] = (
    ("per_layer_activations", None),
    ("early_exit", None),
    ("early_exit", 0),
    ("early_exit", LAYERS - 1),
    ("embed_only", None),
    ("concat_layers", None),
)

every_type = pytest.mark.parametrize(("encoder_type", "layer_idx"), TYPES)
every_family = pytest.mark.parametrize("family", BASES)
# `make test` takes every type on GPT-OSS, and each other family with one type
crossed = pytest.mark.parametrize(
    ("encoder_type", "layer_idx", "family"),
    [
        pytest.param(*kind, family, marks=() if family == "gpt_oss" or row == column % len(TYPES) else pytest.mark.slow)
        for row, kind in enumerate(TYPES)
        for column, family in enumerate(BASES)
    ],
)


def documents(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Ids and positions [1, T] of packed documents."""
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def encode(encoder: ContextEncoder, base: PreTrainedModel, ids: Tensor, position_ids: Tensor) -> Tensor:
    return encoder(ids, position_ids, packed_masks(base, position_ids))


def inputs_of_layers(base: PreTrainedModel, ids: Tensor, position_ids: Tensor) -> list[Tensor]:
    """What transformers reports as the input of each layer."""
    with torch.no_grad():
        output = base(
            input_ids=ids,
            position_ids=position_ids,
            attention_mask=packed_masks(base, position_ids),
            use_cache=False,
            output_hidden_states=True,
        )
    assert len(output.hidden_states) == LAYERS + 1
    return list(output.hidden_states[:-1])  # the last is what leaves the last layer


def expected_features(base: PreTrainedModel, inputs: list[Tensor], kind: EncoderType, exit_at: int | None) -> Tensor:
    norm: nn.Module = base.get_decoder().norm
    with torch.no_grad():
        match kind:
            case "per_layer_activations":
                return torch.stack([*inputs[:-1], norm(inputs[-1])], dim=1)
            case "early_exit":
                return norm(inputs[LAYERS // 4 if exit_at is None else exit_at])
            case "embed_only":
                return base.get_input_embeddings()(documents()[0])
            case "concat_layers":
                return torch.cat([x / x.pow(2).mean(-1, keepdim=True).sqrt() for x in inputs], dim=-1)


def count_hooks(base: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.modules())


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@crossed
def test_features_are_the_hidden_states_that_transformers_reports(
    family: str, encoder_type: EncoderType, layer_idx: int | None
) -> None:
    base = tiny_base(family=family)
    ids, position_ids = documents()
    inputs = inputs_of_layers(base, ids, position_ids)
    features = encode(ContextEncoder(base, encoder_type, layer_idx), base, ids, position_ids)
    rounding = 1e-5 if encoder_type == "concat_layers" else 0.0  # the rest is copied, this is scaled
    expected = expected_features(base, inputs, encoder_type, layer_idx)
    torch.testing.assert_close(features, expected, rtol=rounding, atol=rounding)


@crossed
def test_packed_documents_have_the_features_that_each_has_alone(
    family: str, encoder_type: EncoderType, layer_idx: int | None
) -> None:
    base = tiny_base(family=family)
    encoder = ContextEncoder(base, encoder_type, layer_idx)
    ids, position_ids = documents()
    together = encode(encoder, base, ids, position_ids)
    alone = [encode(encoder, base, part, torch.arange(part.shape[1])[None]) for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=-2), rtol=1e-5, atol=1e-5)


@crossed
def test_layers_from_the_exit_on_are_not_run(family: str, encoder_type: EncoderType, layer_idx: int | None) -> None:
    base = tiny_base(family=family)
    ran: list[int] = []
    for index, layer in enumerate(base.get_decoder().layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    base.lm_head.register_forward_hook(lambda *_: ran.append(LAYERS))
    encoder = ContextEncoder(base, encoder_type, layer_idx)
    encode(encoder, base, *documents())
    exits = {
        "per_layer_activations": LAYERS - 1,
        "concat_layers": LAYERS - 1,
        "embed_only": 0,
        "early_exit": 1 if layer_idx is None else layer_idx,
    }
    assert ran == list(range(exits[encoder_type]))


@every_family
def test_the_base_is_as_it_was(family: str) -> None:
    base = tiny_base(family=family)
    ids, position_ids = documents()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    before = inputs_of_layers(base, ids, position_ids)
    hooks = count_hooks(base)  # transformers leaves its own where hidden states were asked for
    for encoder_type, layer_idx in TYPES:
        encode(ContextEncoder(base, encoder_type, layer_idx), base, ids, position_ids)
        assert count_hooks(base) == hooks
        assert not any(module.training for module in base.modules())
        for one, other in zip(before, inputs_of_layers(base, ids, position_ids), strict=True):
            equal(one, other)
    for name, value in base.state_dict().items():
        equal(value, weights[name])


@every_type
def test_hooks_are_removed_when_a_layer_fails(
    encoder_type: EncoderType, layer_idx: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    encoder = ContextEncoder(base, encoder_type, layer_idx)
    ids, position_ids = documents()
    expected = encode(encoder, base, ids, position_ids)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel fails")

    with monkeypatch.context() as patch:
        patch.setattr(base.get_decoder().rotary_emb, "forward", broken)
        with pytest.raises(RuntimeError, match="a kernel fails"):
            encode(encoder, base, ids, position_ids)
    assert count_hooks(base) == 0
    equal(encode(encoder, base, ids, position_ids), expected)


@every_type
def test_gradient_checkpointing_of_the_base_changes_nothing(encoder_type: EncoderType, layer_idx: int | None) -> None:
    base = tiny_base()
    encoder = ContextEncoder(base, encoder_type, layer_idx)
    expected = encode(encoder, base, *documents())
    checkpoint_layers(base, {"use_reentrant": False})
    hooks = count_hooks(base)
    equal(encode(encoder, base.train(), *documents()), expected)
    assert count_hooks(base) == hooks


def test_the_early_exit_is_at_a_quarter_of_the_layers_unless_said_otherwise() -> None:
    base = tiny_base()
    assert ContextEncoder(base, "early_exit").last == LAYERS // 4
    assert ContextEncoder(base, "early_exit", 3).last == 3
    assert [ContextEncoder(base, kind).per_layer for kind in ("per_layer_activations", "early_exit")] == [True, False]


def test_no_graph_is_kept_even_of_a_base_that_is_not_frozen() -> None:
    base = tiny_base(family="llama").requires_grad_(True)
    for encoder_type, layer_idx in TYPES:
        features = encode(ContextEncoder(base, encoder_type, layer_idx), base, *documents())
        assert not features.requires_grad
    assert torch.is_grad_enabled()


def test_an_exit_beyond_the_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="layer_idx: expected less than the model's 4 layers, found 4"):
        ContextEncoder(tiny_base(), "early_exit", LAYERS)


@pytest.mark.parametrize("family", [GPT2Config, PhiConfig])  # without `layers`; with them and without `norm`
def test_a_decoder_that_is_built_otherwise_is_refused(family: type[PreTrainedConfig]) -> None:
    base = AutoModelForCausalLM.from_config(family(**BASE))
    with pytest.raises(ModelError, match=r"expected a decoder with `layers` and `norm`, found \w+Model without them"):
        ContextEncoder(base, "embed_only")


def test_a_dropped_encoder_keeps_no_weights() -> None:
    """On a GPU they would stay beside the next model's until the garbage collection comes by."""
    base = tiny_base()
    encoder = ContextEncoder(base, "concat_layers")
    ids, position_ids = documents()
    encode(encoder, base, ids, position_ids)
    kept = [weakref.ref(parameter) for parameter in base.parameters()]
    gc.disable()
    try:
        del encoder, base
        assert not any(reference() is not None for reference in kept)
    finally:
        gc.enable()
