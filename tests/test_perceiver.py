"""The Perceiver: parity with the reference, and chunks that never see each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import (
    GRADIENTS,
    OUTPUTS,
    assert_close,
    assert_gradients,
    case_names,
    fill_parameters,
    load_case,
    packed_chunks,
    probe_loss,
)
from support.hypernet_shapes import hypernet_shape
from torch import Tensor

from d2l.base.segments import Segments
from d2l.errors import ModelError
from d2l.hypernet.perceiver import Attention, Perceiver
from d2l.hypernet.shape import HypernetShape

CASES = [
    "perceiver_01_l2l_packed",
    "perceiver_02_l2l_padded",
    "perceiver_03_l2l_packed_m2_b3_s1",
    "perceiver_04_l2l_padded_m2_b3_s1_shared",
    "perceiver_05_exit_packed_b3",
    "perceiver_06_exit_padded_m2_s1",
    "perceiver_07_exit_packed_norank",
    "perceiver_08_l2l_packed_m2_norank",
]
LAYERS, FEATURES = 2, 6
few = settings(derandomize=True, deadline=None, max_examples=8)


def tiny_shape(**values: Any) -> HypernetShape:
    small = {"latent_size": 4, "lora_r": 3, "n_latent_queries": 2, "num_blocks": 2, "num_self_attn_per_block": 1}
    modules = {"o_proj": (6, 6), "q_proj": (6, 6)}
    return hypernet_shape(
        modules, n_layers=LAYERS, feature_size=FEATURES, **{**small, "shared_weights": True, **values}
    )


def tiny(**values: Any) -> Perceiver:
    torch.manual_seed(0)
    return Perceiver(tiny_shape(**values))


def features(lengths: tuple[int, ...], *, per_layer_features: bool = True) -> Tensor:
    """Packed features of chunks of these lengths."""
    shape = (1, LAYERS, sum(lengths), FEATURES) if per_layer_features else (1, sum(lengths), FEATURES)
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(lengths)))


@pytest.mark.golden
class TestParity:
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_and_gradients(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        config = case.config
        keys = ("n_latent_queries", "num_blocks", "num_self_attn_per_block", "shared_weights", "per_rank_gen")
        shape = hypernet_shape(
            {f"module_{number}": (1, 1) for number in range(config["num_modules"])},
            n_layers=config["num_layers"],
            feature_size=config["feature_size"],
            per_layer=config["layer_to_layer_ctx_encoder"],
            latent_size=config["output_size"],
            lora_r=config["lora_r"],
            **{key: config[key] for key in keys},
        )
        perceiver = Perceiver(shape)
        assert list(perceiver.state_dict()) == case.meta["state_dict_keys"]
        fill_parameters(perceiver, case.meta["weights_fill"], case.seed)
        inputs = case["in.ctx_features"].requires_grad_()

        latents = perceiver(*packed_chunks(case))
        probe_loss([latents], case.seed).backward()

        assert_close(latents, case["out.lora_emb"], OUTPUTS)
        assert_close(inputs.grad, case["grad.ctx_features"], GRADIENTS, "gradient of the features")
        assert assert_gradients(perceiver, case) == 7

    def test_no_case_is_left_out(self, shared: Path) -> None:
        assert case_names(shared, "perceiver_") == set(CASES)


class TestChunks:
    @few
    @given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), per_layer_features=st.booleans())
    def test_packed_equals_alone(self, lengths: tuple[int, ...], per_layer_features: bool) -> None:
        perceiver = tiny(per_layer=per_layer_features).double()  # in float32 rounding alone exceeds the bound
        x = features(lengths, per_layer_features=per_layer_features).double()
        together = perceiver(x, Segments(lengths))
        for latents, chunk in zip(together, x.split(lengths, dim=-2), strict=True):
            alone = perceiver(chunk, Segments((chunk.shape[-2],)))[0]
            torch.testing.assert_close(latents, alone, rtol=1e-10, atol=1e-10)

    def test_layers_of_features_stay_apart(self) -> None:
        perceiver, x = tiny(), features((3, 4))
        before = perceiver(x, Segments((3, 4)))
        x[:, 1] += 1
        after = perceiver(x, Segments((3, 4)))
        assert torch.equal(before[:, 0], after[:, 0])
        assert not torch.allclose(before[:, 1], after[:, 1])

    @pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0,)])
    @pytest.mark.parametrize("per_layer_features", [True, False])
    def test_a_chunk_without_tokens_is_finite(self, lengths: tuple[int, ...], per_layer_features: bool) -> None:
        perceiver, x = (
            tiny(per_layer=per_layer_features),
            features(lengths, per_layer_features=per_layer_features),
        )
        latents = perceiver(x, Segments(lengths))
        latents.sum().backward()
        assert latents.isfinite().all()
        assert all(p.grad.isfinite().all() for p in perceiver.parameters())

    def test_no_score_between_chunks_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keys reach to the end of the longest chunk, and the mask has one row per chunk: never [sum T, sum T]."""
        seen = []

        def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            seen.append((key.shape[2], attn_mask.numel() if attn_mask is not None else 0))
            return attend(query, key, value, attn_mask=attn_mask)

        attend = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        lengths = (5, 2, 4)
        tiny()(features(lengths), Segments(lengths))
        assert max(keys for keys, _ in seen) == max(lengths)
        assert max(mask for _, mask in seen) == LAYERS * len(lengths) * max(lengths)


class TestShapes:
    @pytest.mark.parametrize("per_layer_features", [True, False])
    def test_without_ranks_the_output_has_four_axes(self, per_layer_features: bool) -> None:
        x = features((2, 3), per_layer_features=per_layer_features)
        assert tiny(per_layer=per_layer_features)(x, Segments((2, 3))).shape == (2, LAYERS, 2, 3, 4)
        flat = tiny(per_layer=per_layer_features, per_rank_gen=False)(x, Segments((2, 3)))
        assert flat.shape == (2, LAYERS, 2, 4)

    def test_another_number_of_layers_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"features of 1 layers, but the base has 2"):
            tiny()(features((3,))[:, :1], Segments((3,)))

    @pytest.mark.parametrize("lengths", [(2, 3), (4,)])
    def test_features_of_another_length_are_refused(self, lengths: tuple[int, ...]) -> None:
        x = features((4,))
        rows = torch.cat([x, x]) if lengths == (4,) else x
        with pytest.raises(ValueError, match=rf"need features of one row with {sum(lengths)} tokens"):
            tiny()(rows, Segments(lengths))

    def test_bfloat16_features_and_autocast(self) -> None:
        perceiver, x = tiny(), features((3, 2))
        expected = perceiver(x, Segments((3, 2)))
        assert_close(perceiver(x.bfloat16(), Segments((3, 2))), expected, 5e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = perceiver(x, Segments((3, 2)))
        assert narrow.dtype == torch.float32
        assert (narrow - expected).abs().mean() < 0.1


@pytest.mark.parametrize(("heads", "size"), [(16, 128), (8, 3), (4, 5)])
def test_attention_equals_a_loop_over_heads(heads: int, size: int) -> None:
    """Query head h attends with key head h // 4: as published, 16 share 4."""
    torch.manual_seed(0)
    attention = Attention(tiny_shape(perceiver_heads=heads, perceiver_head_dim=size))
    latents, context = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    q, k, v = attention.q_proj(latents), attention.k_proj(context), attention.v_proj(context)
    mixed = torch.zeros_like(q)
    for b in range(2):
        for head in range(heads):
            columns, shared_columns = (slice(h * size, (h + 1) * size) for h in (head, head // 4))
            keys, values = k[b, mask[b], shared_columns], v[b, mask[b], shared_columns]
            mixed[b, :, columns] = (q[b, :, columns] @ keys.T / size**0.5).softmax(-1) @ values
    torch.testing.assert_close(attention(latents, context, mask), attention.o_proj(mixed))


def test_a_query_scale_multiplies_the_first_scores_of_every_attention_and_nothing_else() -> None:
    plain, sharp = (tiny(perceiver_query_scale=scale).state_dict() for scale in (1.0, 10.0))
    for name, value in plain.items():
        torch.testing.assert_close(sharp[name], value * (10 if name.endswith("self_attn.q_proj.weight") else 1))
