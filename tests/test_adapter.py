"""An exported adapter, loaded by PEFT, gives the logits of the bound LoRA: families, precisions, chunks, merged."""

import json
import warnings
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.families import BASES
from support.sizes import LAYERS, RANK
from torch import Tensor, nn
from transformers import PreTrainedModel

from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError, ModelError
from d2l.hypernet.lora import Lora, bind, merge_chunks
from d2l.hypernet.targets import find_targets, target_sizes
from d2l.inference.adapter import export_adapter
from d2l.inference.servers import AdapterForm

# Every token goes through every expert: in bfloat16 a choice among them would flip with the last bit of a hidden state.
ALL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 3}
EXACT = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the logits, and again to what the LoRA adds to them


def make_base(family: str, dtype: str = "float32") -> PreTrainedModel:
    fields = {
        "intermediate_size": 48,
        "initializer_range": 0.02,
    }  # oblong weights; small, as bfloat16 rounds large sums
    config = BASES[family].tiny(**fields, **(ALL_EXPERTS if family == "gpt_oss" else {}))
    return random_base(config, plan_load(RunConfig(dtype=dtype), config, device="cpu"), seed=0)


def make_lora(base: PreTrainedModel, names: tuple[str, ...], chunks: tuple[int, ...] = (1,), bias: bool = True) -> Lora:
    """A merged LoRA of one context per entry of `chunks`, whose effect is of the order of the base's own logits."""
    generator = torch.Generator().manual_seed(0)
    sizes = target_sizes(find_targets(base, names), base.config.hidden_size)
    layers = base.config.num_hidden_layers

    def side(count: int, which: int) -> dict[str, Tensor]:
        return {
            name: torch.randn(count, layers, RANK, size[which], generator=generator) * (0.2 / size[which] ** 0.5)
            for name, size in sizes.items()
        }

    scale = 2 * RANK**1.5
    parts = Lora(side(sum(chunks), 0), side(sum(chunks), 1), scale)
    return merge_chunks(parts, chunks, Lora(side(1, 0), side(1, 1), scale) if bias else None)


IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
        return PeftModel.from_pretrained(deepcopy(base), str(folder))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


# Every family in both precisions, with several chunks and a bias and with neither; GPT-OSS with all of them
QUICK = {(True, 3, "float32"), (False, 1, "bfloat16")}
EXPORTED = [
    pytest.param(
        family,
        *case,
        id=f"{family}-{'bias' if case[0] else 'nobias'}-{case[1]}-{case[2]}",
        marks=() if family == "gpt_oss" or case in QUICK else pytest.mark.slow,
    )
    for family in BASES
    for case in product([True, False], [1, 3], ["float32", "bfloat16"])
]


@pytest.mark.parametrize(("family", "bias", "chunks", "dtype"), EXPORTED)
@torch.no_grad()
def test_peft_gives_the_logits_of_the_bound_lora(
    tmp_path: Path, family: str, bias: bool, chunks: int, dtype: str
) -> None:
    base = make_base(family, dtype)
    lora = make_lora(base, BASES[family].linears, (chunks,), bias)
    rank = export_adapter(lora, base, tmp_path / "adapter", "some/base")
    with bind(find_targets(base, list(lora.A)), lora, rows=[2]):
        expected = base(IDS).logits
    adapter = load_adapter(base, tmp_path / "adapter")
    effect = error(base(IDS).logits, expected)
    assert effect > 0.05
    tolerance = EXACT[dtype] * (1 + effect)
    assert error(adapter(IDS).logits, expected) <= tolerance
    assert error(adapter.merge_and_unload()(IDS).logits, expected) <= tolerance
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert rank == RANK * (chunks + bias)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert config["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        pytest.param(family, chunks, marks=() if family == "gpt_oss" or chunks == 40 else pytest.mark.slow)
        for family, chunks in product(["gpt_oss", "llama", "gemma2", "qwen3", "mistral"], [1, 3, 40])
    ],
)
@torch.no_grad()
def test_peft_gives_the_logits_of_the_bound_lora_after_refactoring(tmp_path: Path, family: str, chunks: int) -> None:
    """The deltas have no more than the smaller rank, so that nothing is lost: chunks that are mixtures of a few rows."""
    base = make_base(family)
    wanted = 1 if chunks < 40 else 8
    mix = torch.Generator().manual_seed(chunks)
    few = make_lora(base, BASES[family].linears, (wanted,), bias=False)

    def mixed(side: dict[str, Tensor]) -> dict[str, Tensor]:
        n_rows = RANK * (chunks + 1)
        return {
            name: torch.randn(n_rows, wanted, generator=mix) @ x[:, :, :wanted] / n_rows**0.25
            for name, x in side.items()
        }

    lora = replace(few, A=mixed(few.A), B=mixed(few.B))
    assert lora.rank == RANK * (chunks + 1) > wanted
    assert export_adapter(lora, base, tmp_path / "adapter", "", AdapterForm("vllm", wanted)) == wanted
    with bind(find_targets(base, list(lora.A)), lora, rows=[2]):
        expected = base(IDS).logits
    effect = error(base(IDS).logits, expected)
    assert effect > 0.01
    assert error(load_adapter(base, tmp_path / "adapter")(IDS).logits, expected) <= EXACT["float32"] * (1 + effect)


@pytest.mark.parametrize("chunks", [1, 3, 40])
@torch.no_grad()
def test_a_server_gets_what_it_stacks_and_ranks_of_its_list(tmp_path: Path, chunks: int) -> None:
    base = make_base("gpt_oss")
    lora = make_lora(base, ("o_proj", "v_proj"), (chunks,))
    with bind(find_targets(base, list(lora.A)), lora, rows=[2]):
        expected = base(IDS).logits
    for server, rank in (("vllm", {1: 8, 3: 8, 40: 128}[chunks]), ("sglang", RANK * (chunks + 1))):
        assert export_adapter(lora, base, tmp_path / server, "", AdapterForm(server)) == rank
        assert error(load_adapter(base, tmp_path / server)(IDS).logits, expected) <= 1e-4
        config = json.loads((tmp_path / server / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (rank, rank, int)
        filled = ["k_proj", "q_proj"] if server == "sglang" else []
        assert config["target_modules"] == sorted([*filled, "o_proj", "v_proj"])


def test_padding_is_left_out_and_what_is_zero_on_one_side_only_is_kept(tmp_path: Path) -> None:
    base = make_base("llama")
    both = make_lora(base, ("q_proj",), (1, 3))
    assert both.rank == 4 * RANK
    export_adapter(both[0], base, tmp_path / "short", "")
    untrained = replace(both[1], B={name: torch.zeros_like(b) for name, b in both.B.items()})
    export_adapter(untrained[0], base, tmp_path / "untrained", "")
    export_adapter(both[1].zeroed(), base, tmp_path / "zeroed", "")
    ranks = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
        for name in ("short", "untrained", "zeroed")
    ]
    assert ranks == [2 * RANK, 4 * RANK, 1]
    assert {
        value.shape[0]
        for name, value in load_file(tmp_path / "short" / "adapter_model.safetensors").items()
        if "lora_A" in name
    } == {2 * RANK}


def test_a_linear_of_the_same_name_elsewhere_is_not_adapted(tmp_path: Path) -> None:
    base = make_base("llama")
    base.model.add_module("vision", nn.ModuleDict({"q_proj": nn.Linear(4, 4)}))
    export_adapter(make_lora(base, ("q_proj",)), base, tmp_path / "adapter", "")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
    adapter = load_adapter(base, tmp_path / "adapter")
    assert not [name for name, _ in adapter.named_parameters() if "vision" in name and "lora" in name]


def test_nothing_is_written_over_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama")
    lora = make_lora(base, ("q_proj",))
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="never written over"):
        export_adapter(lora, base, tmp_path / "mine", "")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2l.inference.adapter.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_adapter(lora, base, tmp_path / "adapter", "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path) -> None:
    base = make_base("llama")
    two = make_lora(base, ("q_proj",), (1, 1))
    with pytest.raises(ValueError, match="one context, this one has 2"):
        export_adapter(two, base, tmp_path / "adapter", "")
    broken = replace(two[0], A={"q_proj": two[0].A["q_proj"] * torch.nan})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        export_adapter(broken, base, tmp_path / "adapter", "")
    with pytest.raises(ModelError, match="down_proj"):
        export_adapter(make_lora(base, ("down_proj",)), make_base("gpt_oss"), tmp_path / "adapter", "")
    assert not list(tmp_path.iterdir())
