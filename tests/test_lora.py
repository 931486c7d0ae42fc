"""The LoRA value, merging, targets and binding: against loops and the reference, under recompute and generation."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.families import BASES
from support.golden import ACCOUNT, BFLOAT16, GRADIENTS, OUTPUTS, assert_close, case_names, load_case, probe_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2l.base.segments import Segments
from d2l.errors import ModelError
from d2l.hypernet.lora import Lora, _ends, bind, checkpoint_contexts, has_grouped_products, merge_chunks
from d2l.hypernet.targets import find_targets, target_sizes

COMBINE = ["combine_01_1", "combine_02_2_1", "combine_03_3_1_2_scalers", "combine_04_2_1_nobias"]
LORA = [
    "lora_01_padded",
    "lora_02_packed",
    "lora_03_packed_nobias",
    "lora_04_packed_bf16_base",
    "lora_05_padded_single",
]
E2E = ["e2e_01_llama_q", "e2e_02_llama_down_3chunks", "e2e_03_qwen3_q_o_exit", "e2e_04_gptoss_q"]

few = settings(derandomize=True, deadline=None, max_examples=15)

LAYERS = 3
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
}  # q_proj: 16 → 32, no Linear is square


def tiny_base(model_type: str = "gpt_oss") -> PreTrainedModel:
    torch.manual_seed(0)
    config = BASES[model_type].tiny(**SIZES, layer_types=None)
    base = AutoModelForCausalLM.from_config(config)
    return base.requires_grad_(False).eval()


def random_lora(sizes: dict[str, tuple[int, int]], n: int, *, layers: int = 3, rank: int = 4, seed: int = 0) -> Lora:
    generator = torch.Generator().manual_seed(seed)

    def leaf(d: int) -> Tensor:
        return torch.randn(n, layers, rank, d, generator=generator).mul_(0.2).requires_grad_()

    return Lora({k: leaf(i) for k, (i, _) in sizes.items()}, {k: leaf(o) for k, (_, o) in sizes.items()}, scale=2.0)


def leaves(*loras: Lora) -> list[Tensor]:
    return [x for lora in loras for side in (lora.A, lora.B) for x in side.values()]


def hooks(base: PreTrainedModel) -> int:
    targets = find_targets(base, NAMES)
    return sum(len(module._forward_hooks) for modules in targets.values() for module in modules)


class TestMerging:
    @pytest.mark.golden
    @pytest.mark.parametrize("name", COMBINE)
    def test_parity(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        config, modules = case.config, case.config["modules"]
        inputs = {key: x.requires_grad_() for key, x in case.tensors.items() if key.startswith("in.") and "proj" in key}
        chunks = Lora({m: inputs[f"in.{m}.A"] for m in modules}, {m: inputs[f"in.{m}.B"] for m in modules}, 1.0)
        bias = None
        if config["bias"]:
            bias_rows = [{m: inputs[f"in.{m}.bias_{side}"][None] for m in modules} for side in "AB"]
            bias = Lora(*bias_rows, 1.0)
        if "in.scalers" in case.tensors:  # the reference scales chunks while it merges them, on A; that is the same
            chunks = replace(chunks, A={m: a * case["in.scalers"][:, None, None, None] for m, a in chunks.A.items()})
        if bias is not None and config["bias_scaler"] is not None:  # on A and B
            bias = Lora(*({m: x * config["bias_scaler"] for m, x in side.items()} for side in (bias.A, bias.B)), 1.0)
        merged = merge_chunks(chunks, config["n_chunks"], bias)
        outputs = [side[m] for m in modules for side in (merged.A, merged.B)]
        probe_loss(outputs, case.seed, step=0).backward()
        for m in modules:
            assert_close(merged.A[m], case[f"out.{m}.A"], OUTPUTS)
            assert_close(merged.B[m], case[f"out.{m}.B"], OUTPUTS)
        for key, x in inputs.items():
            assert_close(x.grad, case[key.replace("in.", "grad.")], GRADIENTS, key)

    @pytest.mark.golden
    def test_no_case_is_left_out(self, shared: Path) -> None:
        assert case_names(shared, "combine_") == set(COMBINE)

    @few
    @given(n_chunks=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), with_bias=st.booleans())
    def test_equals_a_loop(self, n_chunks: list[int], with_bias: bool) -> None:
        chunks = random_lora({"q_proj": (5, 7)}, sum(n_chunks), rank=2)
        bias = random_lora({"q_proj": (5, 7)}, 1, rank=2, seed=1) if with_bias else None
        merged = merge_chunks(chunks, n_chunks, bias)
        assert (merged.n_contexts, merged.rank) == (len(n_chunks), 2 * (max(n_chunks) + 1))
        first = 0
        for context, count in enumerate(n_chunks):
            for layer in range(3):
                rows = [row for chunk in range(first, first + count) for row in chunks.A["q_proj"][chunk, layer]]
                rows += list(bias.A["q_proj"][0, layer]) if bias else []
                rows += [torch.zeros(5)] * (merged.rank - len(rows))
                assert torch.equal(merged.A["q_proj"][context, layer], torch.stack(rows))
            first += count

    def test_a_wrong_number_of_chunks_is_refused(self) -> None:
        with pytest.raises(ValueError, match="adds up to 3, but the LoRA has 2"):
            merge_chunks(random_lora({"q_proj": (5, 7)}, 2), [2, 1])


class TestValue:
    @pytest.mark.parametrize("name", E2E)
    def test_l1_is_the_reference_term(self, shared: Path, name: str) -> None:
        """The golden losses with and without the term differ by 0.1 times it."""
        case = load_case(shared, name)
        modules = case.config["target_modules"]
        lora = Lora(*({m: case[f"out.combined.{m}.{side}"] for m in modules} for side in "AB"), 1.0)
        losses = case.meta["losses"]
        assert 0.1 * lora.l1().item() == pytest.approx(losses["ce_token_l1"] - losses["ce_token"], rel=1e-4)
        ACCOUNT.compare(name, losses["ce_token_l1"])

    def test_index_and_slice(self) -> None:
        lora = random_lora({"q_proj": (5, 7)}, 3)
        assert (lora.n_contexts, lora.rank) == (3, 4)
        assert torch.equal(lora[-1].B["q_proj"], lora.B["q_proj"][2:])
        assert torch.equal(lora[1:].A["q_proj"], lora.A["q_proj"][1:])
        assert lora[0].scale == lora.scale
        with pytest.raises(IndexError):
            lora[3]

    def test_zeroed(self) -> None:
        zeroed = random_lora({"q_proj": (5, 7)}, 2).zeroed()
        assert not any(x.any() for x in leaves(zeroed))
        assert zeroed.A["q_proj"].shape == (2, 3, 4, 5)


class TestTargets:
    @pytest.mark.parametrize("model_type", BASES)
    def test_families(self, model_type: str) -> None:
        base, names = tiny_base(model_type), BASES[model_type].linears
        targets = find_targets(base, names)
        assert list(targets) == list(names)
        for name, linears in targets.items():
            expected = [m for path, m in base.named_modules() if path.endswith(f".{name}") and ".layers." in path]
            assert all(a is b for a, b in zip(linears, expected, strict=True))
            assert len(linears) == LAYERS
        assert target_sizes(targets, 16)["q_proj"] == (16, 32)

    def test_experts_are_parameters(self) -> None:
        with pytest.raises(ModelError) as error:
            find_targets(tiny_base(), ["q_proj", "gate_up_proj", "lora_proj"])
        message = str(error.value)
        assert "gate_up_proj: 0 Linears of that name in every layer; it is a parameter [4, 16, 48]" in message
        assert "lora_proj: 0 Linears of that name in every layer\n" in message
        assert "Linears in every layer: k_proj, o_proj, q_proj, v_proj; beside the whole block: mlp." in message
        assert "q_proj: " not in message

    def test_a_layer_that_lacks_the_module_is_named(self) -> None:
        base = tiny_base("llama")
        base.model.layers[1].self_attn.q_proj = nn.Identity()
        with pytest.raises(ModelError, match=r"q_proj: 0 Linears of that name in layers 1 of 3"):
            find_targets(base, ["q_proj"])

    def test_a_name_that_occurs_twice_is_refused(self) -> None:
        base = tiny_base("llama")
        base.model.layers[2].mlp.q_proj = nn.Linear(1, 1)
        with pytest.raises(ModelError, match=r"q_proj: 2 Linears of that name in layers 2 of 3"):
            find_targets(base, ["q_proj"])

    def test_sizes_that_differ_between_layers_are_refused(self) -> None:
        base = tiny_base("llama")
        base.model.layers[2].self_attn.q_proj = nn.Linear(16, 64)
        with pytest.raises(ModelError, match=r"\(16, 32\) and \(16, 64\)"):
            target_sizes(find_targets(base, ["q_proj"]), 16)


def delta_by_loop(x: Tensor, A: Tensor, B: Tensor, owners: Sequence[int], scale: float) -> Tensor:
    """Token by token: x [N, d_in], A [n, R, d_in], B [n, R, d_out] → [N, d_out]."""
    return torch.stack([scale * ((A[owner] @ token) @ B[owner]) for token, owner in zip(x, owners, strict=True)])


class TestDelta:
    @pytest.mark.golden
    @pytest.mark.parametrize("name", LORA)
    def test_parity(self, shared: Path, name: str) -> None:
        case = load_case(shared, name)
        x, weight, bias = case["in.x"], case["in.weight"], case.tensors.get("in.bias")
        linear = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        x, A, B = (case[f"in.{key}"].requires_grad_() for key in "xAB")
        lora = Lora({"q_proj": A[:, None]}, {"q_proj": B[:, None]}, case.config["scaling"])
        n_queries = case.config["n_qs"]
        if "packed" in name:
            queries = iter(case.config["seq_lens"])
            lengths = {"tokens": Segments(tuple(sum(next(queries) for _ in range(n)) for n in n_queries))}
        else:
            lengths = {"rows": n_queries}

        with bind({"q_proj": [linear]}, lora, **lengths):
            y = linear(x)
        probe_loss([y], case.seed).backward()

        exact = weight.dtype == torch.float32
        assert y.dtype == weight.dtype
        assert_close(y, case["out.y"], OUTPUTS if exact else BFLOAT16)
        for key, leaf in {"x": x, "A": A, "B": B}.items():
            assert leaf.grad.dtype == leaf.dtype
            assert_close(leaf.grad, case[f"grad.{key}"], GRADIENTS if exact else BFLOAT16, key)

    @pytest.mark.golden
    def test_no_case_is_left_out(self, shared: Path) -> None:
        assert case_names(shared, "lora_") == set(LORA)

    @few
    @given(
        counts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
        tokens_per_row=st.integers(1, 3),
        packed=st.booleans(),
    )
    def test_equals_a_loop(self, counts: list[int], tokens_per_row: int, packed: bool) -> None:
        """Empty contexts, of equal and of other lengths, packed and padded inputs, inputs without a batch axis."""
        torch.manual_seed(0)
        linear, lora = nn.Linear(5, 7).requires_grad_(False), random_lora({"q_proj": (5, 7)}, len(counts), layers=1)
        tokens = 1 if packed else tokens_per_row
        lengths = {"tokens": Segments(tuple(counts))} if packed else {"rows": counts}
        rows = torch.randn(sum(counts), tokens, 5, requires_grad=True)
        x = rows.reshape(1, -1, 5) if packed else rows
        owners = [context for context, count in enumerate(counts) for _ in range(count * tokens)]
        probe = torch.randn(sum(counts) * tokens, 7)

        with bind({"q_proj": [linear]}, lora, **lengths):
            y, flat = linear(x), linear(x.reshape(-1, 5))
        assert y.shape == (*x.shape[:-1], 7)
        assert torch.equal(y.reshape(-1, 7), flat)
        gradients = torch.autograd.grad((flat * probe).sum(), [rows, *leaves(lora)])

        A, B = lora.A["q_proj"][:, 0], lora.B["q_proj"][:, 0]
        z = linear(rows.reshape(-1, 5)) + delta_by_loop(rows.reshape(-1, 5), A, B, owners, lora.scale)
        torch.testing.assert_close(flat, z)
        expected = torch.autograd.grad((z * probe).sum(), [rows, *leaves(lora)])
        for actual, oracle in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual, oracle, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("counts", [[32] * 8, [4, 60, 1, 63, 30, 34, 50, 14]])
    def test_nothing_is_kept_per_token_but_the_rank(self, counts: list[int]) -> None:
        """Tensors saved for the backward: the input, A, B and N · R values, never N · R · d."""
        linear = nn.Linear(24, 40).requires_grad_(False)
        lora, saved = random_lora({"q_proj": (24, 40)}, 8, layers=1), []
        x = torch.randn(1, 256, 24, requires_grad=True)

        def save(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            bind({"q_proj": [linear]}, lora, Segments(tuple(counts))),
        ):
            linear(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in saved}
        factors = sum(t.numel() for t in leaves(lora))
        assert sum(storages.values()) <= linear.weight.numel() + x.numel() + factors + 2 * 256 * lora.rank

    @pytest.mark.parametrize("counts", [(6, 6), (8, 4)])
    def test_zeroed_is_the_base_bit_for_bit(self, counts: tuple[int, int]) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            linear, x = nn.Linear(16, 12, dtype=dtype), torch.randn(1, 12, 16, dtype=dtype)
            lora = random_lora({"q_proj": (16, 12)}, 2, layers=1)
            with bind({"q_proj": [linear]}, lora.zeroed(), Segments(tuple(counts))):
                assert torch.equal(linear(x), linear.forward(x))

    @pytest.mark.golden
    def test_a_lora_that_does_not_train_gives_the_reference_bit_for_bit_beside_a_bfloat16_base(
        self, shared: Path
    ) -> None:
        case = load_case(shared, "lora_04_packed_bf16_base")
        linear = nn.Linear(16, 12, dtype=torch.bfloat16)
        linear.load_state_dict({"weight": case["in.weight"], "bias": case["in.bias"]})
        lora = Lora({"q": case["in.A"][:, None]}, {"q": case["in.B"][:, None]}, case.config["scaling"])
        with torch.no_grad(), bind({"q": [linear]}, lora, Segments((7, 5))):
            y = linear(case["in.x"])
        assert torch.equal(y, case["out.y"])
        ACCOUNT.compare(case.name, case["out.y"])

    @pytest.mark.parametrize("counts", [(32, 32), (40, 24)])
    def test_answers_are_those_of_peft_bit_for_bit_beside_a_bfloat16_base(self, counts: tuple[int, int]) -> None:
        """PEFT keeps adapters in float32 by default; the sum of both is rounded once."""
        torch.manual_seed(0)
        base = nn.Sequential(OrderedDict(q=nn.Linear(64, 80, dtype=torch.bfloat16)))
        lora, x = random_lora({"q": (64, 80)}, 2, layers=1), torch.randn(1, 64, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            frozen = lora._map(Tensor.detach)
            with bind({"q": [base.q]}, frozen, Segments(counts)):
                y = base(x)[0].split(counts)
            adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q"]))
            layer = adapted.base_model.model.q
            for context, rows in enumerate(x[0].split(counts)):
                layer.lora_A["default"].weight.copy_(frozen.A["q"][context, 0])
                layer.lora_B["default"].weight.copy_(frozen.B["q"][context, 0].T)
                assert torch.equal(y[context], adapted(rows))

    def test_training_beside_a_bfloat16_base_keeps_no_float32_copy_of_the_input(self) -> None:
        linear = nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
        x = torch.randn(1, 256, 24, dtype=torch.bfloat16, requires_grad=True)
        kept: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda it: it),
            bind({"q_proj": [linear]}, random_lora({"q_proj": (24, 40)}, 2, layers=1), Segments((128, 128))),
        ):
            assert linear(x).dtype == torch.bfloat16
        assert not any(tensor.dtype == torch.float32 and tensor.numel() >= x.numel() for tensor in kept)

    def test_a_linear_that_overrides_forward_is_honoured(self) -> None:
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        linear, lora = Doubled(5, 7), random_lora({"q_proj": (5, 7)}, 1, layers=1)
        x = torch.randn(1, 3, 5)
        plain = linear(x)
        with bind({"q_proj": [linear]}, lora, Segments((3,))):
            delta = linear(x) - plain
        expected = delta_by_loop(x[0], lora.A["q_proj"][:, 0], lora.B["q_proj"][:, 0], [0, 0, 0], lora.scale)
        torch.testing.assert_close(delta[0], expected)

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ({"tokens": Segments((2, 3))}, "covers 5 tokens"),
            ({"tokens": Segments((1, 2))}, "covers 3 tokens"),  # as rows they would fit: nothing is guessed
            ({"rows": [3, 1]}, "covers 4 rows"),
            ({"rows": [0, 0]}, "covers 0 rows"),
        ],
    )
    def test_an_input_that_the_contexts_do_not_cover_is_refused(self, lengths: dict[str, Any], message: str) -> None:
        linear, lora = nn.Linear(5, 7), random_lora({"q_proj": (5, 7)}, 2, layers=1)
        with bind({"q_proj": [linear]}, lora, **lengths), pytest.raises(ValueError, match=message):
            linear(torch.randn(1, 6, 5))

    @pytest.mark.parametrize(
        "lora",
        [
            random_lora({"k_proj": (5, 7)}, 1, layers=1),
            random_lora({"q_proj": (5, 7)}, 1, layers=2),
            random_lora({"q_proj": (5, 7)}, 2, layers=1),
        ],
    )
    def test_a_lora_that_does_not_fit_is_refused(self, lora: Lora) -> None:
        for lengths in ({"tokens": Segments((3,))}, {"rows": [3]}):
            with pytest.raises(ValueError, match=f"cannot bind.*{next(iter(lengths))} of 1 contexts"):
                bind({"q_proj": [nn.Linear(5, 7)]}, lora, **lengths)

    @pytest.mark.parametrize("lengths", [{}, {"tokens": Segments((3,)), "rows": [1]}])
    def test_lengths_are_given_in_one_unit(self, lengths: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="either the tokens or the rows"):
            bind({"q_proj": [nn.Linear(5, 7)]}, random_lora({"q_proj": (5, 7)}, 1, layers=1), **lengths)


NAMES = ["mlp", "o_proj", "q_proj"]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_base()


def lora_for(base: PreTrainedModel, n: int = 2, seed: int = 0) -> Lora:
    return random_lora(target_sizes(find_targets(base, NAMES), base.config.hidden_size), n, seed=seed)


def logits(base: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return base(input_ids=ids, use_cache=False).logits


class TestScope:
    def test_unbound_is_the_base_before_and_after(self, base: PreTrainedModel) -> None:
        targets, plain = find_targets(base, NAMES), logits(base)
        with bind(targets, lora_for(base), Segments((5, 7))):
            bound = logits(base)
        assert not torch.allclose(bound, plain, atol=1e-2)
        assert torch.equal(logits(base), plain)
        assert hooks(base) == 0

    def test_an_exception_restores_the_base(self, base: PreTrainedModel) -> None:
        targets, plain = find_targets(base, NAMES), logits(base)
        with pytest.raises(KeyError), bind(targets, lora_for(base), Segments((5, 7))):
            raise KeyError
        with pytest.raises(ValueError, match="covers"), bind(targets, lora_for(base), Segments((5, 8))):
            logits(base)
        assert torch.equal(logits(base), plain)
        assert hooks(base) == 0

    def test_the_innermost_binding_acts_alone(self, base: PreTrainedModel) -> None:
        targets = find_targets(base, NAMES)
        outer, inner = (bind(targets, lora_for(base, seed=seed), Segments((5, 7))) for seed in (1, 2))
        with outer:
            alone = logits(base)
        with inner:
            expected = logits(base)
        with outer:
            with inner, inner:
                assert torch.equal(logits(base), expected)
            assert torch.equal(logits(base), alone)
        assert hooks(base) == 0

    def test_bindings_of_two_threads_do_not_mix(self, base: PreTrainedModel) -> None:
        targets = find_targets(base, NAMES)
        bindings = [bind(targets, lora_for(base, seed=seed), Segments((5, 7))) for seed in (1, 2)]
        expected = []
        for binding in bindings:
            with binding:
                expected.append(logits(base))
        meeting, results = threading.Barrier(2), {}

        def work(i: int) -> None:
            with bindings[i]:
                meeting.wait()
                results[i] = logits(base)
                meeting.wait()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[i], expected[i]) for i in range(2))

    def test_contexts_are_served_their_own_lora(self, base: PreTrainedModel) -> None:
        """Padded rows of two contexts in one batch equal each context alone."""
        targets, lora = find_targets(base, NAMES), lora_for(base)
        rows = torch.cat([IDS, IDS + 5, IDS + 9])
        with bind(targets, lora, rows=[1, 2]):
            together = logits(base, rows)
        for row, context in enumerate([0, 1, 1]):
            with bind(targets, lora[context], rows=[1]):
                torch.testing.assert_close(together[row], logits(base, rows[row : row + 1])[0], rtol=1e-4, atol=1e-5)


def generate(base: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    return base.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, **options
    )


class TestGeneration:
    @pytest.mark.parametrize("rows", [(1, 1), (1, 2)])
    @pytest.mark.parametrize("beams", [1, 2])
    def test_with_a_cache(self, base: PreTrainedModel, rows: tuple[int, int], beams: int) -> None:
        """A batch of contexts generates what each generates alone, step by step with another input length."""
        targets, lora = find_targets(base, NAMES), lora_for(base)
        prompts = torch.cat([IDS + 3 * i for i in range(sum(rows))])
        with bind(targets, lora, rows=rows):
            together = generate(base, prompts, do_sample=False, num_beams=beams)
        plain = generate(base, prompts, do_sample=False, num_beams=beams)
        owners = [context for context, count in enumerate(rows) for _ in range(count)]
        for row, context in enumerate(owners):
            with bind(targets, lora[context], rows=[1]):
                alone = generate(base, prompts[row : row + 1], do_sample=False, num_beams=beams)
            assert torch.equal(together[row], alone[0])
        assert not torch.equal(together, plain)

    def test_greedy_without_a_cache_is_the_same(self, base: PreTrainedModel) -> None:
        targets, lora = find_targets(base, NAMES), lora_for(base)
        with torch.inference_mode(), bind(targets, lora, rows=[1, 1]):
            cached = generate(base, torch.cat([IDS, IDS + 5]), do_sample=False)
            ids = torch.cat([IDS, IDS + 5])
            for _ in range(5):
                ids = torch.cat([ids, logits(base, ids)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(cached, ids)


def in_another_thread(work: Callable[[], None]) -> None:
    """As CUDA's autograd does: the thread of the backward has bound nothing itself."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors, errors


class TestRecompute:
    """Checkpointed forwards under different LoRAs, then one backward: gradients as without checkpointing."""

    def gradients(self, base: PreTrainedModel, scene: str, lora: Lora, other: Lora) -> list[Tensor]:
        targets, tokens = find_targets(base, NAMES), Segments((5, 7))
        for leaf in leaves(lora, other):
            leaf.grad = None
        with bind(targets, lora, tokens):
            first = logits(base).square().mean()
        with bind(targets, other, tokens):
            loss = first - logits(base, IDS + 3).pow(3).mean()
        if scene == "another binding at backward":
            with bind(targets, lora_for(base, seed=9), tokens):
                loss.backward()
        elif scene == "another thread":
            with bind(targets, lora_for(base, seed=9), tokens):
                in_another_thread(loss.backward)
        elif scene == "twice":
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            loss.backward()
        return [leaf.grad.clone() for leaf in leaves(lora, other)]

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its heir is newer than 5.10
    @pytest.mark.parametrize(
        "scene", ["two forwards, one backward", "another binding at backward", "another thread", "twice"]
    )
    def test_gradients_are_exact(self, base: PreTrainedModel, scene: str) -> None:
        lora, other = lora_for(base, seed=1), lora_for(base, seed=2)
        base.train()
        expected = self.gradients(base, scene, lora, other)
        options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        actual = self.gradients(base, scene, lora, other)
        for a, b in zip(actual, expected, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert hooks(base) == 0

    def test_an_unbound_forward_is_recomputed_unbound(self) -> None:
        """A LoRA that is bound only at backward time must not reach the recompute."""
        linear, lora = nn.Linear(5, 7), random_lora({"q_proj": (5, 7)}, 1, layers=1)
        x = torch.randn(1, 3, 5, requires_grad=True)

        def squared(x: Tensor) -> Tensor:
            return linear(x).square()

        (expected,) = torch.autograd.grad(squared(x).sum(), x)
        y = checkpoint(squared, x, use_reentrant=False, context_fn=checkpoint_contexts)
        with bind({"q_proj": [linear]}, lora, Segments((3,))):
            (actual,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(3, 8, 1, 4), (1, 15)])
def test_grouped_products_are_the_products_of_each_context(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """The path of a GPU of SM 90, by the same function on the CPU, which computes in another order."""
    linear = nn.Linear(24, 16).to(dtype).requires_grad_(False)
    x, probe = torch.randn(1, 16, 24), torch.randn(1, 16, 16, dtype=dtype)

    def run(grouped: bool) -> list[Tensor]:
        monkeypatch.setattr("d2l.hypernet.lora.has_grouped_products", lambda *_: grouped)
        lora = random_lora({"q": (24, 16)}, len(lengths), layers=1, rank=8)
        tokens = x.clone().to(dtype).requires_grad_()
        with bind({"q": [linear]}, lora, Segments(lengths)):
            output = linear(tokens)
        return [output, *torch.autograd.grad(output, [tokens, *leaves(lora)], probe)]

    for actual, expected in zip(run(grouped=True), run(grouped=False), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )
    assert _ends(lengths, torch.device("cpu")).tolist() == [sum(lengths[: i + 1]) for i in range(len(lengths))]


def test_grouped_products_need_a_gpu_that_has_them() -> None:
    assert not has_grouped_products(*(torch.zeros(8, 8, dtype=torch.bfloat16) for _ in range(3)), (8,))
