"""vLLM's rules of loading an adapter, as a formula, give the weights that the bound LoRA adds; what it refuses is not written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import BASES
from support.sizes import RANK
from support.vllm_lora import FUSED, RANKS, served_deltas
from test_adapter import make_base, make_lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from d2l.hypernet.lora import Lora, bind
from d2l.hypernet.targets import find_targets
from d2l.inference.adapter import export_adapter

FAMILIES = ("gpt_oss", "llama", "qwen3", "gemma", "mistral")


def sizes(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


@torch.no_grad()
def bound_deltas(base: PreTrainedModel, lora: Lora) -> dict[str, Tensor]:
    """What the bound LoRA adds to each Linear's weight: its answer to the unit vectors, the Linear itself being zero."""
    targets = find_targets(base, list(lora.A))
    names = {module: name for name, module in base.named_modules()}
    found = {}
    for module in (module for modules in targets.values() for module in modules):
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()
    with bind(targets, lora, rows=[1]):
        for module in (module for modules in targets.values() for module in modules):
            found[names[module]] = module(torch.eye(module.in_features)[None])[0].T.double()
    return found


def parts(layer: str) -> list[str]:
    """The Linears of transformers in one of vLLM's layers."""
    parent, _, last = layer.replace(".attn.", ".self_attn.").rpartition(".")
    return [f"{parent}.{name}" for name in FUSED.get(last, (last,))]


@pytest.mark.parametrize("names", [None, ("v_proj",), ("o_proj", "v_proj")], ids=["all", "v", "o+v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_adds_what_the_bound_lora_adds(tmp_path: Path, family: str, names: tuple[str, ...] | None) -> None:
    base = make_base(family)
    lora = make_lora(base, names or BASES[family].linears, (3,))
    rank = export_adapter(lora, base, tmp_path / "adapter", "some/base")
    shapes = sizes(base)
    served = served_deltas(tmp_path / "adapter", shapes, family, next(item for item in RANKS if item >= rank))
    expected = bound_deltas(base, lora)
    covered = []
    for layer, delta in served.items():
        linears = parts(layer)
        covered += [name for name in linears if name in expected]
        zeros = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in linears}
        want = torch.cat([expected.get(name, zeros[name]) for name in linears])
        assert delta.shape == want.shape
        assert (delta - want).abs().max() <= 1e-6 * want.abs().max()
    assert sorted(covered) == sorted(expected)
    assert (".attn." in str(list(served))) == (family == "gpt_oss")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[str, Tensor], tuple[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        changed = dict(change(*item) for item in load_file(file).items())
        save_file({name: value.contiguous() for name, value in changed.items()}, file)

    return edit


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "DoRA": (edit_config(use_dora=True), "use_dora"),
    "bias": (edit_config(bias="all"), "bias"),
    "rank": (edit_config(r=RANKS[-1] + 8), "greater than max_lora_rank"),
    "another module": (edit_tensors(lambda name, value: (name.replace("v_proj", "w_proj"), value)), "not applied"),
    "another name": (edit_tensors(lambda name, value: (name.replace("lora_A", "lora_X"), value)), "no LoRA weight"),
    "shape": (edit_tensors(lambda name, value: (name, value[:, :-1])), "expected A|ranks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_formula_refuses_what_vllm_refuses(tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    base = make_base("llama")
    export_adapter(make_lora(base, ("v_proj",)), base, tmp_path / "adapter", "some/base")
    assert served_deltas(tmp_path / "adapter", sizes(base), "llama", 8)
    change(tmp_path / "adapter")
    with pytest.raises(ValueError, match=words):
        served_deltas(tmp_path / "adapter", sizes(base), "llama", 8)


def test_ranks_between_those_of_the_list_need_the_next_one(tmp_path: Path) -> None:
    base = make_base("llama")
    rank = export_adapter(make_lora(base, ("v_proj",), (4,)), base, tmp_path / "adapter", "some/base")
    assert rank == 5 * RANK
    with pytest.raises(ValueError, match="greater than max_lora_rank 8"):
        served_deltas(tmp_path / "adapter", sizes(base), "llama", 8)
    with pytest.raises(ValueError, match="not one of"):
        served_deltas(tmp_path / "adapter", sizes(base), "llama", 10)
    assert served_deltas(tmp_path / "adapter", sizes(base), "llama", 16)
