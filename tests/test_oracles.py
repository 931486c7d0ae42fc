"""The oracles against something that is not d2l: torch, transformers, and the stored numbers of the reference."""

import ast
import math
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.golden import OUTPUTS, Case, assert_close, load_case
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    get_scheduler,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from checks.oracles import edited_weights, experts, features, hypernetwork, loss, mxfp4, optimizer, schedule
from checks.oracles.fill import filled
from checks.oracles.hypernetwork import Switches
from checks.oracles.stored import StoredCase, stored_cases
from checks.rules import mxfp4_decoded_wrong

FOLDER = Path(__file__).resolve().parents[1] / "checks" / "oracles"
JUDGED = {"d2l", "checks", "commands", "cli"}
FAMILIES: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gpt_oss": GptOssConfig}
WHOLE = ("e2e_01_llama_q", "e2e_02_llama_down_3chunks", "e2e_03_qwen3_q_o_exit", "e2e_04_gptoss_q")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_oracle_imports_nothing_that_it_could_judge() -> None:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [it.name for it in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            own = {name for name in names if name.startswith("checks.oracles")}
            assert not {name.split(".")[0] for name in set(names) - own} & JUDGED, path.name


class TestLoss:
    LABELS = (-100, 5, -100, 0, 2, 6)

    def test_cross_entropy_is_that_of_torch_one_place_later(self) -> None:
        logits = random(6, 7)
        shifted = torch.tensor(self.LABELS[1:])
        expected = functional.cross_entropy(logits[:-1], shifted, reduction="none", ignore_index=-100)
        torch.testing.assert_close(loss.cross_entropy(logits, self.LABELS), expected[shifted != -100])

    def test_a_label_at_the_first_place_is_never_predicted(self) -> None:
        assert len(loss.cross_entropy(random(3, 7), (4, -100, -100))) == 0
        assert len(loss.divergence(random(3, 7), (4, -100, -100), [], [])) == 0

    def test_the_divergence_is_torchs_kl_plus_the_teachers_entropy(self) -> None:
        logits, teacher = random(6, 7), random(4, 7, seed=1).log_softmax(-1)
        vals, indices = teacher.topk(7)
        kl = functional.kl_div(logits.log_softmax(-1)[[0, 2, 3, 4]], teacher, log_target=True, reduction="none").sum(-1)
        entropy = -(teacher.exp() * teacher).sum(-1)
        ours = loss.divergence(logits, self.LABELS, vals.tolist(), indices.tolist())
        torch.testing.assert_close(ours, kl + entropy)
        two = loss.divergence(logits, self.LABELS, vals[:, :2].tolist(), indices[:, :2].tolist())
        expected = -(vals[:, :2].exp() * logits.log_softmax(-1)[[0, 2, 3, 4]].gather(1, indices[:, :2])).sum(-1)
        torch.testing.assert_close(two, expected)  # the teacher's two do not sum to one, and are not made to

    def test_means(self) -> None:
        none = torch.zeros(0, dtype=torch.float64)
        step = [[torch.tensor([1.0, 3.0]), torch.tensor([5.0]), none], [torch.tensor([9.0])], [none]]
        assert float(loss.token_mean(step)) == (1 + 3 + 5 + 9) / 4
        assert float(loss.context_mean(step)) == pytest.approx((((1 + 3) / 2 + 5) / 2 + 9 + 0) / 3)
        assert float(loss.token_mean([[none]])) == float(loss.context_mean([[none]])) == 0

    def test_l1_counts_the_rows_that_a_context_lacks(self) -> None:
        A = [{"q": torch.full((2, 3, 4), -1.0)}, {"q": torch.full((2, 6, 4), 1.0)}]
        B = [{"q": torch.full((2, 3, 5), 2.0)}, {"q": torch.full((2, 6, 5), -2.0)}]
        assert float(loss.lora_l1(A, B, rank=6)) == pytest.approx(((1 + 2) / 2 + (1 + 2)) / 2)


def small_base(family: str = "llama", **values: Any) -> PreTrainedModel:
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4, **values}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(FAMILIES[family](**settings), dtype=torch.float64).eval()
    return computed_eagerly(base)


def computed_eagerly(base: PreTrainedModel) -> PreTrainedModel:
    """Experts one by one: grouped products do not take float64."""
    if base.config.model_type == "gpt_oss":
        base.set_experts_implementation("eager")
    return base


class TestEditedWeights:
    IDS = (3, 9, 1, 22, 7)

    def test_no_lora_is_the_base(self) -> None:
        base = small_base()
        torch.testing.assert_close(
            edited_weights.logits(base, self.IDS, {}, {}, 2.0), base(torch.tensor([self.IDS])).logits[0]
        )

    def test_weights_are_those_of_a_model_edited_in_place_and_the_base_stays(self) -> None:
        base = small_base()
        A, B = {"q_proj": random(3, 2, 16), "down_proj": random(3, 2, 24)}, {"q_proj": random(3, 2, 32, seed=1)}
        B["down_proj"] = random(3, 2, 16, seed=2)
        ours = edited_weights.logits(base, self.IDS, A, B, 0.5)
        torch.testing.assert_close(
            edited_weights.logits(base, self.IDS, {}, {}, 1), small_base()(torch.tensor([self.IDS])).logits[0]
        )
        with torch.no_grad():
            for i, layer in enumerate(base.model.layers):
                for target, linear in (("q_proj", layer.self_attn.q_proj), ("down_proj", layer.mlp.down_proj)):
                    for rank in range(2):
                        linear.weight += 0.5 * torch.outer(B[target][i, rank], A[target][i, rank])
        torch.testing.assert_close(ours, base(torch.tensor([self.IDS])).logits[0])

    @pytest.mark.parametrize("family", ["llama", "gpt_oss"])
    def test_a_block_has_its_delta_beside_it(self, family: str) -> None:
        """A second MLP beside the first, computed by a forward of the class's own."""
        more = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "gpt_oss" else {}
        base = small_base(family, **more)
        A, B = random(3, 2, 16), random(3, 2, 16, seed=1)
        ours = edited_weights.logits(base, self.IDS, {"mlp": A}, {"mlp": B}, 0.5)
        for i, layer in enumerate(base.model.layers):
            layer.mlp = _Beside(layer.mlp, 0.5 * B[i].T @ A[i])
        torch.testing.assert_close(ours, base(torch.tensor([self.IDS])).logits[0])

    def test_gradients_arrive(self) -> None:
        A, B = random(3, 2, 16).requires_grad_(), random(3, 2, 32).requires_grad_()
        edited_weights.logits(small_base(), self.IDS, {"q_proj": A}, {"q_proj": B}, 1.0).pow(2).sum().backward()
        assert all(x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 0).all() for x in (A, B))


class _Beside(nn.Module):
    def __init__(self, block: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.block, self.weight = block, weight

    def forward(self, x: Tensor) -> Any:
        output, delta = self.block(x), functional.linear(x, self.weight)
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta


def test_features_that_the_reference_has_no_numbers_of() -> None:
    base, ids = small_base(), (3, 9, 1)
    embedded = base.get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(features.of_chunk(base, features.layer_inputs(base, ids), "embed_only"), embedded)
    layers = [features.of_chunk(base, features.layer_inputs(base, ids), "per_layer_activations")[i] for i in range(2)]
    last = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].detach()
    rms = [functional.rms_norm(x, x.shape[-1:], eps=1e-30) for x in (*layers, last)]
    torch.testing.assert_close(
        features.of_chunk(base, features.layer_inputs(base, ids), "concat_layers"), torch.cat(rms, dim=-1)
    )
    with pytest.raises(ValueError, match="ctx_encoder_type"):
        features.of_chunk(base, features.layer_inputs(base, ids), "late_exit")


class TestMxfp4:
    def test_every_byte_and_many_scales_against_transformers(self) -> None:
        blocks = torch.arange(4 * 8 * 16 * 16).remainder(256).to(torch.uint8).reshape(4, 8, 16, 16)
        scales = torch.arange(4 * 8 * 16).remainder(250).to(torch.uint8).reshape(4, 8, 16)
        ours = mxfp4.decode(blocks, scales)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float64)
        assert torch.equal(ours, theirs.transpose(1, 2))

    def test_a_few_bytes_by_hand(self) -> None:
        block = torch.zeros(1, 16, dtype=torch.uint8)
        block[0, :3] = torch.tensor([0x21, 0xF7, 0x9A])
        values = mxfp4.decode(block, torch.tensor([128], dtype=torch.uint8))
        assert values[:6].tolist() == [1.0, 2.0, 12.0, -12.0, -2.0, -1.0]


def test_experts_are_those_of_transformers_where_the_clamp_acts() -> None:
    config = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    mlp = GptOssMLP(config).double()
    with torch.no_grad():
        for i, parameter in enumerate(mlp.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i))
    own = mlp.experts
    weights = experts.Weights(
        router=mlp.router.weight,
        router_bias=mlp.router.bias,
        gate_up=own.gate_up_proj.transpose(1, 2),
        gate_up_bias=own.gate_up_proj_bias,
        down=own.down_proj.transpose(1, 2),
        down_bias=own.down_proj_bias,
    )
    x = random(7, 16, seed=99, scale=3.0).requires_grad_()
    ours, theirs = experts.block(x, weights, top_k=3), mlp(x[None])[0][0]
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, experts.block(x, weights, top_k=3, limit=math.inf))
    probe = random(7, 16, seed=5)
    gradients = [torch.autograd.grad((output * probe).sum(), x)[0] for output in (ours, theirs)]
    torch.testing.assert_close(*gradients)


class TestOptimizer:
    def test_three_updates_of_adamw(self) -> None:
        start, settings = random(5, 4), {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
        parameter = nn.Parameter(start.clone())
        theirs = torch.optim.AdamW([parameter], **settings)  # type: ignore[arg-type]
        ours, state = start, None
        for step in (1, 2, 3):
            parameter.grad = random(5, 4, seed=step)
            theirs.step()
            ours, state = optimizer.adamw(ours, parameter.grad, state, step, **settings)  # type: ignore[arg-type]
            torch.testing.assert_close(ours, parameter.detach())

    @pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
    def test_two_updates_of_muon(self, shape: tuple[int, int]) -> None:
        """torch's takes single matrices, and iterates in bfloat16."""
        start = random(3, *shape)
        matrices = [nn.Parameter(matrix.clone()) for matrix in start]
        theirs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        ours, momentum = start, None
        for step in (1, 2):
            gradient = random(3, *shape, seed=step)
            for matrix, own in zip(matrices, gradient, strict=True):
                matrix.grad = own
            theirs.step()
            ours, momentum = optimizer.muon(ours, gradient, momentum, lr=0.1, weight_decay=0.2)
            update = (ours - start).abs().max()
            assert (ours - torch.stack([it.detach() for it in matrices])).abs().max() < 0.02 * update

    @pytest.mark.parametrize("max_norm", [0.5, 1e4])
    def test_clipping(self, max_norm: float) -> None:
        gradients = {"a": random(5), "b": random(2, 3, seed=1)}
        parameters = [nn.Parameter(torch.zeros_like(x)) for x in gradients.values()]
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        ours = optimizer.clipped(gradients, max_norm)
        torch.testing.assert_close(list(ours.values()), [it.grad for it in parameters], rtol=1e-5, atol=0)

    @pytest.mark.golden
    @pytest.mark.parametrize("name", WHOLE)
    def test_what_decays_are_the_weights_of_linears_alone(self, shared: Path, name: str) -> None:
        """In the stored cases norms are filled around 1, weights around 0; the rest is known by name."""
        case = load_case(shared, name)
        rules = case.meta["hyper_weights_fill"]
        decaying = {name for name, rule in rules.items() if optimizer.decays(name, rule["shape"])}
        words = ("scaler", "bias", "latents_q")
        assert decaying == {n for n, r in rules.items() if r["offset"] == 0 and not any(w in n for w in words)}
        assert {"head.weight", "aggregator.perceiver.modality_projection.up_proj.weight"} <= decaying
        compare_something_of(case)


@pytest.mark.parametrize("kind", schedule.KINDS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules(kind: str, warmup: int) -> None:
    options = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "linear"},
    }
    parameter = nn.Parameter(torch.zeros(1))
    user = torch.optim.SGD([parameter], lr=2.0)
    theirs = get_scheduler(kind, user, warmup, 12, scheduler_specific_kwargs=options.get(kind, {}))
    for step in range(13):
        ours = schedule.learning_rate(step, kind, 2.0, warmup, 12, min_lr=0.1, decay_steps=4)
        assert ours == pytest.approx(user.param_groups[0]["lr"], abs=1e-12), step
        user.step()
        theirs.step()


def test_a_schedule_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="warmup_stable_decay"):
        schedule.learning_rate(0, "polynomial", 1.0, 0, 10)


def compare_something_of(case: Case) -> None:
    """Tell the account of golden files that the case was used, by a value that it holds."""
    assert_close(case["in.labels"].float(), case["in.labels"], 0)


def golden_base(case: Case) -> PreTrainedModel:
    """The case's base, as transformers builds it, with the case's weights in float64."""
    config = FAMILIES[case.meta["base_family"]](**case.meta["base_config"])
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    base.load_state_dict(filled(case.meta["base_weights_fill"], case.seed, "base."), strict=False)
    return computed_eagerly(base)


def pieces(ids: Tensor, positions: Tensor) -> list[list[int]]:
    """The ids of every chunk or question of a packed row."""
    found: list[list[int]] = []
    for token, position in zip(ids[0].tolist(), positions[0].tolist(), strict=True):
        if position == 0:
            found.append([])
        found[-1].append(token)
    return found


def golden_features(case: Case, base: PreTrainedModel) -> list[Tensor]:
    config = case.config
    layer = config["layer_idx"] if config["ctx_encoder_type"] == "early_exit" else None
    chunks = pieces(case["in.ctx_ids"], case["in.ctx_position_ids"])
    return [
        features.of_chunk(base, features.layer_inputs(base, ids), config["ctx_encoder_type"], layer) for ids in chunks
    ]


def golden_loras(case: Case, base: PreTrainedModel) -> list[hypernetwork.Merged]:
    weights = filled(case.meta["hyper_weights_fill"], case.seed)
    config, n_layers = case.config, case.meta["base_config"]["num_hidden_layers"]
    layer = base.get_decoder().layers[0]
    linears = {n.split(".")[-1]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    names = (
        "lora_r",
        "num_blocks",
        "num_self_attn_per_block",
        "per_layer_processing",
        "num_pre_head_layers",
        "use_bias",
    )
    switches = Switches(
        modules={name: (linears[name].in_features, linears[name].out_features) for name in config["target_modules"]},
        n_layers=n_layers,
        per_layer_features=config["ctx_encoder_type"] == "per_layer_activations",
        **{name: config[name] for name in names},
    )
    assert switches.scale == pytest.approx(config["lora_alpha"])
    return hypernetwork.loras(weights, switches, golden_features(case, base), case["in.n_ctx_chunks"].tolist())


class TestStored:
    """The numbers that are shipped with HYP202."""

    @pytest.mark.parametrize("stored", stored_cases(), ids=lambda case: case.name)
    def test_the_formulas_give_the_shipped_numbers(self, stored: StoredCase) -> None:
        config = AutoConfig.for_model(stored.model_type, **stored.base_config)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
        base.load_state_dict(dict(stored.base_weights))
        settings = dict(stored.config)
        encoder, layer, names = (settings.pop(key, None) for key in ("ctx_encoder_type", "layer_idx", "target_modules"))
        own = {key: settings[key] for key in settings if key in Switches.__dataclass_fields__}
        switches = Switches(
            modules=edited_weights.sizes(base, names),
            n_layers=config.num_hidden_layers,
            per_layer_features=encoder == "per_layer_activations",
            **own,
        )
        chunks = [
            features.of_chunk(base, features.layer_inputs(base, ids), encoder, layer)
            for context in stored.contexts
            for ids in context
        ]
        merged = hypernetwork.loras(stored.weights, switches, chunks, [len(context) for context in stored.contexts])
        assert switches.scale == pytest.approx(stored.scale)
        for module in names:
            for side in "AB":
                ours = torch.stack([getattr(it, side)[module] for it in merged])
                assert_close(ours, getattr(stored, side)[module], OUTPUTS, f"{side} of {module}")

    @pytest.mark.golden
    @pytest.mark.parametrize("stored", stored_cases(), ids=lambda case: case.name)
    def test_they_are_those_of_the_golden_files(self, shared: Path, stored: StoredCase) -> None:
        case = load_case(shared, stored.name)
        for module in case.config["target_modules"]:
            assert_close(stored.A[module], case[f"out.combined.{module}.A"], 1e-6)
            assert_close(stored.B[module], case[f"out.combined.{module}.B"], 1e-6)
        rules = case.meta["hyper_weights_fill"], case.meta["base_weights_fill"]
        weights, base_weights = filled(rules[0], case.seed), filled(rules[1], case.seed, "base.")
        for ours, theirs in ((stored.weights, weights), (stored.base_weights, base_weights)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_bytes_that_qnt203_writes_are_all_there_are() -> None:
    """In the experts that it compares, in both projections, under every scale of its range."""
    sizes = SimpleNamespace(hidden_size=64, intermediate_size=96, num_local_experts=8)
    for name in mxfp4_decoded_wrong.PROJECTIONS:
        blocks, scales = mxfp4_decoded_wrong._fixed_bytes(SimpleNamespace(twin_base_config=sizes), name)  # type: ignore[arg-type]
        low, high = mxfp4_decoded_wrong.SCALES
        for expert in (0, 7):
            assert len(blocks[expert].unique()) == 256
            assert scales[expert].unique().tolist() == list(range(low, high + 1))
        assert not torch.equal(blocks[0], blocks[7])


@pytest.mark.golden
class TestReference:
    @pytest.mark.parametrize("name", WHOLE)
    def test_features_loras_logits_and_losses(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        base = golden_base(case)
        found = torch.cat(golden_features(case, base), dim=-2)
        assert_close(found[None], case["out.ctx_features"], OUTPUTS, "features")
        merged = golden_loras(case, base)
        for module in case.config["target_modules"]:
            assert_close(torch.stack([it.A[module] for it in merged]), case[f"out.combined.{module}.A"], OUTPUTS, "A")
            assert_close(torch.stack([it.B[module] for it in merged]), case[f"out.combined.{module}.B"], OUTPUTS, "B")
        questions = pieces(case["in.input_ids"], case["in.position_ids"])
        owners = [i for i, count in enumerate(case["in.n_queries"].tolist()) for _ in range(count)]
        scale = case.config["lora_alpha"]
        logits = [
            edited_weights.logits(base, ids, merged[owner].A, merged[owner].B, scale)
            for ids, owner in zip(questions, owners, strict=True)
        ]
        assert_close(torch.cat(logits)[None].detach(), case["out.logits"], OUTPUTS, "logits")
        self.check_losses(case, [it.detach() for it in logits], merged, owners)

    def check_losses(
        self, case: Case, logits: list[Tensor], merged: list[hypernetwork.Merged], owners: list[int]
    ) -> None:
        labels = pieces(case["in.labels"], case["in.position_ids"])
        vals, indices = iter(case["in.logprobs_vals"].tolist()), iter(case["in.logprobs_indices"].tolist())
        ce: list[list[Tensor]] = [[] for _ in merged]
        kl: list[list[Tensor]] = [[] for _ in merged]
        for own, its_labels, owner in zip(logits, labels, owners, strict=True):
            count = sum(label != -100 for label in its_labels[1:])
            ce[owner].append(loss.cross_entropy(own, its_labels))
            teacher = [next(vals) for _ in range(count)], [next(indices) for _ in range(count)]
            kl[owner].append(loss.divergence(own, its_labels, *teacher))
        l1 = loss.lora_l1([it.A for it in merged], [it.B for it in merged], next(iter(merged[0].A.values())).shape[1])
        for kind, losses in (("ce", ce), ("kl", kl)):
            for reduction, mean in (("token", loss.token_mean(losses)), ("perctx", loss.context_mean(losses))):
                stored = case.meta["losses"]
                assert float(mean) == pytest.approx(stored[f"{kind}_{reduction}"], rel=OUTPUTS)
                assert float(mean + 0.1 * l1) == pytest.approx(stored[f"{kind}_{reduction}_l1"], rel=OUTPUTS)

    @pytest.mark.parametrize(
        "name",
        [
            "hyper_01_plp_q",
            "hyper_02_shared_q",
            "hyper_03_plp2_q_o",
            "hyper_04_shared2_q_o_exit_padded",
            "hyper_05_plp_down_exit",
        ],
    )
    def test_rows_of_every_chunk(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        config, aggregator = case.config, case.config["aggregator"]
        d_in, d_out = config["feature_sizes"]
        switches = Switches(
            modules={module: (d_in[module], d_out[module]) for module in d_in},
            n_layers=config["n_layers"],
            lora_r=config["r"],
            per_layer_features=aggregator["layer_to_layer_ctx_encoder"],
            num_pre_head_layers=config["num_pre_head_layers"],
            per_layer_processing=config["per_layer_processing"],
            **{key: aggregator[key] for key in ("num_blocks", "num_self_attn_per_block", "shared_weights")},
        )
        weights = filled(case.meta["weights_fill"], case.seed)
        rows = [
            hypernetwork.chunk_rows(double(weights), switches, hypernetwork.latents_of(double(weights), switches, x))
            for x in chunk_features(case)
        ]
        for module in d_in:
            assert_close(torch.stack([a[module] for a, _ in rows]), case[f"out.{module}.A"], OUTPUTS, "A")
            assert_close(torch.stack([b[module] for _, b in rows]), case[f"out.{module}.B"], OUTPUTS, "B")

    @pytest.mark.parametrize("name", ["perceiver_03_l2l_packed_m2_b3_s1", "perceiver_04_l2l_padded_m2_b3_s1_shared"])
    def test_latents_of_a_deep_perceiver(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        config = case.config
        switches = Switches(
            modules={"a": (1, 1), "b": (1, 1)},
            n_layers=config["num_layers"],
            lora_r=config["lora_r"],
            per_layer_features=config["layer_to_layer_ctx_encoder"],
            **{key: config[key] for key in ("num_blocks", "num_self_attn_per_block", "shared_weights")},
        )
        weights = double(filled(case.meta["weights_fill"], case.seed))
        named = {f"aggregator.{key}": value for key, value in weights.items()}
        latents = [hypernetwork.latents_of(named, switches, x) for x in chunk_features(case)]
        stacked = torch.stack(
            [torch.stack([torch.stack([torch.stack(m) for m in layer]) for layer in it]) for it in latents]
        )
        assert_close(stacked, case["out.lora_emb"], OUTPUTS, "latents")

    @pytest.mark.parametrize("name", ["combine_01_1", "combine_02_2_1", "combine_04_2_1_nobias"])
    def test_merging(self, shared: Path, name: str) -> None:
        """Through the oracle's own merging of rows; the head is left out by rows that are given."""
        case = load_case(shared, name)
        config = case.config
        biased = config["bias"]
        switches = SimpleNamespace(use_bias=biased)
        ends = list(accumulate(config["n_chunks"], initial=0))
        for module in config["modules"]:
            for side in "AB":
                weights = {"bias": case[f"in.{module}.bias_{side}"]} if biased else {}
                chunks = [list(case[f"in.{module}.{side}"][start:end]) for start, end in pairwise(ends)]
                ours = [hypernetwork._stacked(weights, switches, own, "bias", config["n_chunks"]) for own in chunks]  # type: ignore[arg-type]
                assert_close(torch.stack(ours), case[f"out.{module}.{side}"], OUTPUTS, f"{side} of {module}")


def double(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in weights.items()}


def chunk_features(case: Case) -> list[Tensor]:
    """The features of each chunk alone, [L, S, F] or [S, F]."""
    x = case["in.ctx_features"].double()
    if case.meta["mode"] == "padded":
        return [row[..., :length, :] for row, length in zip(x, case.meta["lens"], strict=True)]
    return list(x[0].split(case.meta["lens"], dim=-2))
