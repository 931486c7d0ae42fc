"""`mlp` as a target, beside a whole MLP or Mixture-of-Experts block: against a loop over tokens, and through the commands."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.sizes import BASE
from support.tiny_run import make_run, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner, Result

import cli
from checks.production import make_subject
from checks.report import plain_text
from checks.rules import RULES
from checks.runner import run_checks
from checks.selftest import run_selftest
from d2l.base.segments import Segments
from d2l.data.needles import needle_records
from d2l.data.records import write_records
from d2l.errors import ModelError
from d2l.hypernet.lora import Lora, bind, merge_chunks
from d2l.hypernet.targets import find_targets, target_sizes

HIDDEN, LAYERS, RANK, SCALE = 16, 3, 2, 1.5
CHUNKS = (1, 3, 2)  # ranks of 4, 8 and 6 with the bias, in one packed row
LENGTHS = (5, 4, 6)
IDS = torch.arange(3, 3 + sum(LENGTHS))[None]

EXPERTS: dict[str, dict[str, Any]] = {
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},  # its block returns a tuple
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
    "Llama": {},
    "Gemma2": {},  # normalises what its block returns
}


def make_base(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **BASE | {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": LAYERS} | EXPERTS[family]
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).eval()


def make_chunks(count: int, seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(count, LAYERS, RANK, HIDDEN, generator=generator).mul_(0.3).requires_grad_() for _ in "AB")
    return Lora({"mlp": A}, {"mlp": B}, SCALE)


class Looped(nn.Module):
    """The oracle: a block, and beside it the delta of one token, one chunk and one rank after the other."""

    def __init__(self, block: nn.Module, layer: int, owners: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        super().__init__()
        self.block, self.layer, self.owners = block, layer, owners

    def forward(self, x: Tensor) -> Any:
        output = self.block(x)
        deltas = []
        for token, parts in zip(x.reshape(-1, HIDDEN), self.owners, strict=True):
            delta = torch.zeros(HIDDEN)
            for a, b in parts:
                for rank in range(RANK):
                    delta = delta + SCALE * (a[self.layer, rank] @ token) * b[self.layer, rank]
            deltas.append(delta)
        added = torch.stack(deltas).reshape(x.shape)
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


def looped(base: PreTrainedModel, chunks: Lora, bias: Lora) -> PreTrainedModel:
    """The base with the LoRA of each context's chunks and the bias; it never sees the merged, padded value."""
    shared = (bias.A["mlp"][0], bias.B["mlp"][0])
    each = list(zip(chunks.A["mlp"], chunks.B["mlp"], strict=True))
    contexts = [[*each[sum(CHUNKS[:i]) : sum(CHUNKS[: i + 1])], shared] for i in range(len(CHUNKS))]
    owners = [parts for parts, length in zip(contexts, LENGTHS, strict=True) for _ in range(length)]
    oracle = deepcopy(base)
    for index, layer in enumerate(oracle.model.layers):
        layer.mlp = Looped(layer.mlp, index, owners)
    return oracle


def logits(base: PreTrainedModel) -> Tensor:
    return base(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", EXPERTS)
def test_packed_contexts_of_different_ranks_equal_a_loop_with_their_gradients(family: str) -> None:
    base = make_base(family)
    chunks, bias = make_chunks(sum(CHUNKS), seed=1), make_chunks(1, seed=2)
    leaves = [side["mlp"] for lora in (chunks, bias) for side in (lora.A, lora.B)]
    targets = find_targets(base, ["mlp"])
    assert [id(block) for block in targets["mlp"]] == [id(layer.mlp) for layer in base.model.layers]
    assert target_sizes(targets, HIDDEN) == {"mlp": (HIDDEN, HIDDEN)}

    with bind(targets, merge_chunks(chunks, CHUNKS, bias), Segments(tuple(LENGTHS))):
        actual = logits(base)
    expected = logits(looped(base, chunks, bias))
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    probe = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((it * probe).sum(), leaves) for it in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-2
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_zeroed_is_the_base_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    base = make_base(family, dtype)
    plain = logits(base)
    for lengths in (LENGTHS, (5, 5, 5)):
        with bind(find_targets(base, ["mlp"]), make_chunks(3, seed=1).zeroed(), Segments(tuple(lengths))):
            assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), plain)


def test_of_a_tuple_the_hidden_states_alone_change() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.square(), scores

    scores, block, x = torch.randn(7, 4), Block(), torch.randn(1, 7, HIDDEN)
    lora = make_chunks(1, seed=1)
    one_layer = Lora({"mlp": lora.A["mlp"][:, :1]}, {"mlp": lora.B["mlp"][:, :1]}, SCALE)
    with bind({"mlp": [block]}, one_layer, Segments((7,))):
        hidden, returned = block(x)
    assert returned is scores
    A, B = lora.A["mlp"][0, 0], lora.B["mlp"][0, 0]
    expected = torch.stack([token.square() + SCALE * B.T @ (A @ token) for token in x[0]])
    torch.testing.assert_close(hidden[0], expected)


def test_a_layer_without_the_block_is_named() -> None:
    base = make_base("Llama")
    base.model.layers[1].feed_forward = base.model.layers[1].mlp
    del base.model.layers[1].mlp
    with pytest.raises(ModelError, match=r"mlp: 0 blocks of that name in layers 1 of 3") as error:
        find_targets(base, ["mlp"])
    assert "beside the whole block" not in str(error.value)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), target_modules=("mlp",))


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")


def test_a_checkpoint_is_refused_as_an_adapter_and_answers_otherwise(run_folder: Path, tmp_path: Path) -> None:
    records = needle_records(2, 2, 2, 0, seed=1)
    document, data = tmp_path / "document.md", tmp_path / "needles.jsonl"
    document.write_text(records[0].context)
    write_records(data, records)
    refused = d2l("internalize", run_folder, document, "-o", tmp_path / "adapter")
    assert refused.exit_code == 2
    assert "no adapter can be written for target_modules [mlp]" in refused.stderr
    assert "no adapter format" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["document.md", "needles.jsonl"]
    assert d2l("ask", run_folder, document, records[0].prompts[0], "--max-new-tokens", "3").exit_code == 0
    assert d2l("eval", run_folder, "--data", data, "--max-new-tokens", "3").exit_code == 0


# The checks that look at a target, or at what a step reads and writes through it
OF_TARGETS = ("TGT", "HYP", "LOR", "ATT", "ENC", "GRD201", "GRD204", "EXP", "BAS")


@pytest.mark.parametrize(
    ("names", "select"),
    [
        (("mlp",), OF_TARGETS),
        pytest.param(("mlp",), (), marks=pytest.mark.slow),
        pytest.param(("mlp", "q_proj"), (), marks=pytest.mark.slow),
    ],
)
def test_the_checks_are_green_and_say_what_cannot_be_exported(names: tuple[str, ...], select: Sequence[str]) -> None:
    report = run_checks(make_subject(tiny_config(target_modules=names)), RULES, select=select)
    assert report.exit_code() == 0, plain_text(report)
    skipped = {outcome.code: outcome.message for outcome in report if outcome.outcome == "inapplicable"}
    assert skipped.keys() - {"GRD202", "BAS401", "BAS402", "DAT401", "STP401", "MEM402"} == {"EXP201", "EXP203"} | (
        {"LOR201"} if names == ("mlp",) else set()
    )
    assert "no adapter format" in skipped["EXP201"]


@pytest.mark.parametrize("most", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_the_checks_see_the_faults_of_a_block(most: int) -> None:
    """Most faults of each check: its first one in `make test`, all of them in `make fuzz`."""
    codes = ["TGT101", "LOR202", "GRD201"]
    rules = [replace(rule, faults=rule.faults[:most]) for rule in RULES if rule.code in {*codes, "HYP201", "LOR204"}]
    selftest = run_selftest(make_subject(tiny_config(target_modules=("mlp",))), rules, select=codes)
    assert selftest.exit_code() == 0, plain_text(selftest)
    assert selftest.count("missed") == 0
