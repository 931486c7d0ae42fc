"""The hypernetwork: parity with the reference, initial statistics, and latents that it must refuse."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import (
    ACCOUNT,
    GRADIENTS,
    OUTPUTS,
    Case,
    assert_close,
    assert_gradients,
    case_names,
    fill_parameters,
    init_stats,
    load_case,
    packed_chunks,
    probe_loss,
    stored_gradients,
)
from support.hypernet_shapes import hypernet_shape
from torch import Tensor

from d2l.base.segments import Segments
from d2l.errors import ModelError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape

CASES = [
    "hyper_01_plp_q",
    "hyper_02_shared_q",
    "hyper_03_plp2_q_o",
    "hyper_04_shared2_q_o_exit_padded",
    "hyper_05_plp_down_exit",
    "hyper_06_iterative_q",  # the reference one layer at a time: the same numbers as all layers at once
]
REFUSED = ["hyper_07_norank_error", "hyper_08_norank_shared_error"]

MODULES = {"q_proj": (10, 14), "o_proj": (6, 4)}
SMALL = {"lora_r": 2, "latent_size": 8, "n_latent_queries": 4, "num_blocks": 1}


def tiny_shape(
    modules: Mapping[str, tuple[int, int]] = MODULES, feature_size: int = 12, **values: Any
) -> HypernetShape:
    return hypernet_shape(modules, n_layers=3, feature_size=feature_size, **{**SMALL, **values})


def tiny(**values: Any) -> Hypernetwork:
    torch.manual_seed(0)
    return Hypernetwork(tiny_shape(**values))


def golden_shape(config: Mapping[str, Any]) -> HypernetShape:
    aggregator = config["aggregator"]
    d_in, d_out = config["feature_sizes"]
    own = ("latent_size", "per_layer_processing", "num_pre_head_layers")
    of_aggregator = ("n_latent_queries", "num_blocks", "num_self_attn_per_block", "shared_weights", "per_rank_gen")
    return hypernet_shape(
        {name: (d_in[name], d_out[name]) for name in config["target_modules"]},
        n_layers=config["n_layers"],
        feature_size=aggregator["feature_size"],
        per_layer=aggregator["layer_to_layer_ctx_encoder"],
        lora_r=config["r"],
        **{key: config[key] for key in own},
        **{key: aggregator[key] for key in of_aggregator},
    )


def golden_hypernetwork(case: Case) -> tuple[Hypernetwork, Tensor, Segments]:
    hypernet = Hypernetwork(golden_shape(case.config))
    fill_parameters(hypernet, case.meta["weights_fill"], case.seed)
    case["in.ctx_features"].requires_grad_()
    return hypernet, *packed_chunks(case)


def latents(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 2, 2, 8, generator=torch.Generator().manual_seed(n))


@pytest.mark.golden
class TestParity:
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_and_gradients(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        hypernet, features, segments = golden_hypernetwork(case)
        assert {key: list(x.shape) for key, x in hypernet.state_dict().items()} == case.meta["state_dict"]
        rows: list[Tensor] = []
        hypernet.head.register_forward_hook(lambda module, args, output: rows.append(output))

        lora = hypernet(features, segments)
        probe_loss([side[key] for key in lora.A for side in (lora.A, lora.B)], case.seed).backward()

        assert_close(hypernet.aggregator(features, segments), case["out.lora_emb"], OUTPUTS)
        assert_close(rows[0], case["out.flat_loras"], OUTPUTS)
        assert list(lora.A) == sorted(case.config["target_modules"])
        for key in lora.A:
            assert_close(lora.A[key], case[f"out.{key}.A"], OUTPUTS)
            assert_close(lora.B[key], case[f"out.{key}.B"], OUTPUTS)
            assert_close(hypernet.bias().A[key][0], case[f"out.head_bias.{key}.A"], 0)
            assert_close(hypernet.bias().B[key][0], case[f"out.head_bias.{key}.B"], 0)
        assert_close(case["in.ctx_features"].grad, case["grad.ctx_features"], GRADIENTS, "gradient of the features")
        assert assert_gradients(hypernet, case) == stored_gradients(case) > 0

    @pytest.mark.parametrize("name", REFUSED)
    def test_where_the_reference_crashes(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        hypernet, features, segments = golden_hypernetwork(case)
        assert_close(hypernet.aggregator(features, segments), case["out.lora_emb"], OUTPUTS)
        with pytest.raises(ModelError, match="per_rank_gen: true"):
            hypernet(features, segments)

    def test_no_case_is_left_out(self, shared: Path) -> None:
        assert case_names(shared, "hyper_") == {*CASES, *REFUSED}


class TestLatents:
    @pytest.mark.parametrize("rank", [1, 2])
    def test_latents_without_ranks_are_refused(self, rank: int) -> None:
        hypernet = tiny(per_rank_gen=False, lora_r=rank)
        with pytest.raises(ModelError, match=rf"\[n, 3, 2, {rank}, 8\].*per_rank_gen: true"):
            hypernet(torch.randn(1, 3, 4, 12), Segments((4,)))

    @pytest.mark.parametrize("shape", [(2, 3, 2, 1, 8), (2, 1, 2, 2, 8), (2, 3, 1, 2, 8), (2, 3, 2, 2, 1)])
    def test_nothing_is_broadcast(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ModelError, match=r"the aggregator gave"):
            tiny().lora(torch.randn(shape))

    def test_every_rank_has_rows_of_its_own(self) -> None:
        lora = tiny().lora(latents())
        assert not torch.allclose(lora.A["q_proj"][:, :, 0], lora.A["q_proj"][:, :, 1])

    @pytest.mark.parametrize("per_layer_processing", [True, False])
    def test_a_zero_latent_is_not_nan(self, per_layer_processing: bool) -> None:
        hypernet = tiny(per_layer_processing=per_layer_processing, num_pre_head_layers=0)
        zero = torch.zeros(1, 3, 2, 2, 8, requires_grad=True)
        lora = hypernet.lora(zero)
        (lora.A["q_proj"].sum() + lora.B["q_proj"].sum()).backward()
        assert torch.equal(lora.A["q_proj"], torch.zeros_like(lora.A["q_proj"]))
        assert zero.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in hypernet.parameters())

    @pytest.mark.parametrize("per_layer_processing", [True, False])
    def test_layers_have_weights_of_their_own_where_asked(self, per_layer_processing: bool) -> None:
        x = latents()[:, :1].expand(2, 3, 2, 2, 8)
        processed = tiny(per_layer_processing=per_layer_processing).layers[0](x)
        assert torch.allclose(processed[:, 0], processed[:, 1]) is not per_layer_processing


class TestRows:
    """The head against loops, without oracle data."""

    @pytest.mark.parametrize("modules", [{"q_proj": (10, 14)}, {"q_proj": (10, 14), "o_proj": (6, 4)}])
    def test_head_equals_loops(self, modules: dict[str, tuple[int, int]]) -> None:
        hypernet = tiny(modules=modules, num_pre_head_layers=0)
        for name in modules:
            torch.nn.init.normal_(hypernet.scaler_A[name])
            torch.nn.init.normal_(hypernet.scaler_B[name])
        x = latents()[:, :, : len(modules)] * 1e-3  # short, but not zero: made one long like any other
        lora = hypernet.lora(x)
        weight = hypernet.head.weight.reshape(3, len(modules), 8, 24)
        for chunk in range(2):
            for layer in range(3):
                for m, name in enumerate(sorted(modules)):
                    for rank in range(2):
                        latent = x[chunk, layer, m, rank]
                        row = latent / math.sqrt(sum(v * v for v in latent.tolist())) @ weight[layer, m]
                        d_in, d_out = modules[name]
                        a = row[:d_in] * hypernet.scaler_A[name][0, layer, rank]
                        b = row[d_in : d_in + d_out] * hypernet.scaler_B[name][0, layer, rank]
                        torch.testing.assert_close(lora.A[name][chunk, layer, rank], a)
                        torch.testing.assert_close(lora.B[name][chunk, layer, rank], b)

    def test_layer_by_layer_gives_the_same(self) -> None:
        """Every layer's LoRA depends on that layer's features alone, so that layers can be made one at a time."""
        hypernet, features = tiny(), torch.randn(1, 3, 5, 12)
        before = hypernet(features, Segments((5,))).A["q_proj"]
        features[:, 2] = 0
        after = hypernet(features, Segments((5,))).A["q_proj"]
        assert torch.equal(before[:, :2], after[:, :2])
        assert not torch.allclose(before[:, 2], after[:, 2])

    @pytest.mark.parametrize(("rank", "scale"), [(8, 45.254833995939045), (2, 5.656854249492381), (1, 2.0)])
    def test_scale(self, rank: int, scale: float) -> None:
        assert tiny_shape(lora_r=rank).scale == pytest.approx(scale, rel=1e-12)

    def test_sizes_of_other_modules_than_the_targets_are_refused(self) -> None:
        with pytest.raises(AssertionError, match=r"target_modules are \['k_proj'\], but there are sizes of \['o_proj'"):
            tiny_shape(target_modules=("k_proj",))

    def test_without_a_bias(self) -> None:
        hypernet = tiny(use_bias=False)
        assert hypernet.bias() is None
        assert not [name for name in hypernet.state_dict() if name.startswith("bias")]


class TestInitialisation:
    @pytest.mark.golden
    def test_shapes_and_statistics_of_the_reference(self, shared: Path) -> None:
        stats = init_stats(shared)
        expected = stats.pop("__expected__")
        shape = tiny_shape({"q_proj": (16, 32)}, feature_size=16, lora_r=8, latent_size=32)
        torch.manual_seed(0)
        hypernet = Hypernetwork(shape)
        assert shape.scale == expected["lora_alpha"]
        actual = dict(hypernet.named_parameters())
        assert {name: list(p.shape) for name, p in actual.items()} == {name: s["shape"] for name, s in stats.items()}
        for name, p in actual.items():
            reference = stats[name]
            if reference["std"] == 0:
                assert torch.equal(p, torch.full_like(p, reference["mean"])), name
                continue
            # A standard deviation from n samples is off by about 1 / sqrt(2 n); the reference's is one such sample too.
            noise = 4 / math.sqrt(p.numel())
            assert p.std().item() == pytest.approx(reference["std"], rel=noise), name
            assert p.mean().item() == pytest.approx(0, abs=5 * reference["std"] / math.sqrt(p.numel())), name
        ACCOUNT.compare("init_stats", [expected["lora_alpha"], *([s["shape"], s["std"]] for s in stats.values())])

    def test_formulas(self) -> None:
        hypernet = tiny(modules={"q_proj": (64, 96)}, latent_size=64, lora_r=4)
        uniform = {
            "layers.0.layers.1.weight": math.sqrt(3 / 64),
            "layers.0.layers.1.bias": math.sqrt(1 / 64),
            "layers.0.layers.3.weight": math.sqrt(3 / 256),
            "aggregator.perceiver.modality_projection.gate_proj.weight": 1 / math.sqrt(12),
        }
        for name, bound in uniform.items():
            assert hypernet.get_parameter(name).abs().max().item() == pytest.approx(bound, rel=0.05), name
            assert hypernet.get_parameter(name).abs().max() <= bound, name
        normal = {
            "head.weight": 0.5 / math.sqrt(64 + 160 * 4),
            "bias_A.q_proj": 0.2 / math.sqrt(64 * 4),
            "aggregator.perceiver.encoder.latents_q": 1.0,
        }
        for name, std in normal.items():
            assert hypernet.get_parameter(name).std().item() == pytest.approx(std, rel=0.2), name

    def test_the_first_lora_is_zero(self) -> None:
        """B and its bias start at zero, so a fresh run starts at the base's own loss."""
        hypernet = tiny()
        lora, bias = hypernet(torch.randn(1, 3, 5, 12), Segments((2, 3))), hypernet.bias()
        assert not any(b.any() for b in (*lora.B.values(), *bias.B.values()))
        assert all(a.any() for a in (*lora.A.values(), *bias.A.values()))
