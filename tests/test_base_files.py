"""What BAS401 says of the files of a base: whole ones, of all layouts, and such as strangers have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from checks.hollow import write_hollow
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from d2l.base.config import read_base_config
from d2l.base.twin import twin_config
from d2l.config.schema import RunConfig

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "phi3", "mixtral", "qwen3_moe")


def judged(folder: Path, **values: Any) -> Outcome:
    subject = make_subject(RunConfig(model_name_or_path=str(folder), **values), with_data=False)
    (outcome,) = run_checks(subject, RULES, select=("BAS401",)).outcomes
    return outcome


def write(folder: Path, config: PreTrainedConfig) -> None:
    """Write a random model as transformers does."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_whole(tmp_path: Path, family: str) -> None:
    write(tmp_path, twin_config(AutoConfig.for_model(family)))
    outcome = judged(tmp_path)
    assert outcome.outcome == "pass", outcome
    stored = sum(it.numel() for it in load_file(tmp_path / "model.safetensors").values())
    assert outcome.evidence["values"] == stored >= outcome.evidence["parameters"] > 0


@pytest.mark.parametrize(
    "family",  # without experts and with them
    [pytest.param(it, marks=() if it in ("llama", "mixtral") else pytest.mark.slow) for it in FAMILIES],
)
def test_any_tensor_that_is_missing_is_missed(tmp_path: Path, family: str) -> None:
    write(tmp_path, twin_config(AutoConfig.for_model(family)))
    whole = load_file(tmp_path / "model.safetensors")
    for name in list(whole)[:: max(1, len(whole) // 6)]:
        save_file(
            {key: it for key, it in whole.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        assert judged(tmp_path).outcome == "fail", name


def published_20b() -> dict[str, torch.Tensor]:
    """The tensors of openai/gpt-oss-20b as its files list them, on the meta device."""
    experts, hidden, blocks = 32, 2880, 90
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.sinks": (64,),
        "self_attn.o_proj.weight": (hidden, 4096),
        "self_attn.o_proj.bias": (hidden,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
    }
    for name, width in (("q", 4096), ("k", 512), ("v", 512)):
        layer |= {f"self_attn.{name}_proj.weight": (width, hidden), f"self_attn.{name}_proj.bias": (width,)}
    for name, width in (("gate_up_proj", 5760), ("down_proj", 2880)):
        layer |= {
            f"mlp.experts.{name}_blocks": (experts, width, blocks, 16),
            f"mlp.experts.{name}_bias": (experts, width),
        }
        layer |= {f"mlp.experts.{name}_scales": (experts, width, blocks)}
    shapes = {f"model.layers.{number}.{name}": shape for number in range(24) for name, shape in layer.items()}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (201088, hidden))
    shapes["model.norm.weight"] = (hidden,)
    of_bytes = ("_blocks", "_scales")
    return {
        name: torch.empty(shape, dtype=torch.uint8 if name.endswith(of_bytes) else torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("experts", ["packed", "dequantize"])
def test_the_published_gpt_oss_20b_is_whole(tmp_path: Path, experts: str) -> None:
    tensors = published_20b()
    read_base_config("openai/gpt-oss-20b").save_pretrained(tmp_path)
    write_hollow(tmp_path / "model.safetensors", tensors)
    assert (tmp_path / "model.safetensors").stat().st_size > 13.7e9  # and next to none of it on the disk
    outcome = judged(tmp_path, expert_weights=experts)
    assert outcome.outcome == "pass", outcome
    assert outcome.evidence == {"tensors": 459, "values": 20_914_757_184, "parameters": 20_914_757_184}
    del tensors["model.embed_tokens.weight"]
    write_hollow(tmp_path / "model.safetensors", tensors)
    outcome = judged(tmp_path, expert_weights=experts)
    assert "1 missing (such as model.embed_tokens.weight)" in (outcome.actual or "")


def test_a_copy_without_its_large_files_is_told_how_to_ask_for_a_random_base(tmp_path: Path) -> None:
    twin_config(AutoConfig.for_model("llama")).save_pretrained(tmp_path)
    outcome = judged(tmp_path)
    assert outcome.outcome == "fail"
    assert f"For a random base, give the config file itself ({tmp_path / 'config.json'})" in (outcome.actual or "")
    assert judged(tmp_path / "config.json").outcome == "inapplicable"


def test_weights_that_are_elsewhere_are_not_judged() -> None:
    outcome = judged(Path("openai/gpt-oss-20b"))
    assert (outcome.outcome, "are not on this machine" in outcome.message) == ("skip", True)


@pytest.mark.parametrize("cut", [0, 1])
def test_hollow_files_are_files_of_safetensors(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.empty(3, 5, device="meta", dtype=torch.bfloat16), "b": torch.empty(2**20, dtype=torch.uint8)}
    write_hollow(file, tensors, cut=cut)
    assert file.stat().st_blocks * 512 < 2**16
    if cut:
        with pytest.raises(Exception, match=r"incomplete|not fully covered"), safe_open(file, "pt"):
            pass
        return
    assert {name: (it.shape, it.dtype) for name, it in load_file(file).items()} == {
        name: (it.shape, it.dtype) for name, it in tensors.items()
    }
