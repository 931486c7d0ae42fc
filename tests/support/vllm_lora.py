"""How vLLM loads a LoRA adapter's folder, as a formula: names, refusals, scale, stacking into its fused layers, buffers.

Written anew from the rules of vLLM 0.33 (`lora/peft_helper.py`, `lora/lora_model.py`, `lora/model_manager.py`,
`lora/layers/column_parallel_linear.py`, `config/lora.py`), for one process without a GPU. What vLLM passes over in silence is
an error here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
RENAMED = {"gpt_oss": (".self_attn.", ".attn.")}  # by model type: how its modules are called there
_PREFIX = "base_model.model."
_REFUSED = (  # fields of adapter_config.json that may not be set
    *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora"),
    "use_qalora",
)


def served_deltas(
    folder: Path, sizes: Mapping[str, tuple[int, int]], model_type: str, max_rank: int
) -> dict[str, Tensor]:
    """Return what is added to the weight of each of vLLM's layers that the adapter changes, float64 [out, in].

    Args:
        sizes: of the base's Linears by their names in transformers: rows and columns of the weight.
        max_rank: the server's --max-lora-rank.

    Raises:
        ValueError: vLLM refuses the adapter, or would not apply all of it.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = _scale(config, max_rank)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, side, weight = name.rsplit(".", 2)
        if not module.startswith(_PREFIX) or side not in ("lora_A", "lora_B") or weight != "weight":
            raise ValueError(f"{name} is no LoRA weight")
        pairs.setdefault(_rename(module.removeprefix(_PREFIX), model_type), {})[side] = tensor.double()
    deltas: dict[str, Tensor] = {}
    for layer, parts in _layers(sizes, model_type).items():
        if not any(part in pairs for part in parts):
            continue
        slices = [_slice(part, size, pairs.pop(part, None), scale, max_rank) for part, size in parts.items()]
        deltas[layer] = torch.cat(slices)
    if pairs:
        raise ValueError(f"not applied: {sorted(pairs)}")
    return deltas


def _scale(config: dict[str, object], max_rank: int) -> float:
    rank, alpha = config["r"], config["lora_alpha"]
    if max_rank not in RANKS:
        raise ValueError(f"max_lora_rank {max_rank} is not one of {RANKS}")
    if not isinstance(rank, int) or not 0 < rank <= max_rank or not isinstance(alpha, int | float):
        raise ValueError(f"rank {rank} is greater than max_lora_rank {max_rank}")
    if config.get("bias", "none") != "none" or (refused := [name for name in _REFUSED if config.get(name)]):
        raise ValueError(f"not supported: {'bias' if config.get('bias', 'none') != 'none' else refused[0]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("d2l writes one rank and one alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _rename(module: str, model_type: str) -> str:
    old, new = RENAMED.get(model_type, ("", ""))
    return module.replace(old, new, 1) if old else module


def _layers(sizes: Mapping[str, tuple[int, int]], model_type: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Return vLLM's layers with the Linears that each stands for, in the order of their rows."""
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    for name, size in sizes.items():
        parent, _, last = _rename(name, model_type).rpartition(".")
        fused = next((fused for fused, parts in FUSED.items() if last in parts), last)
        layers.setdefault(f"{parent}.{fused}", {})[f"{parent}.{last}"] = size
    for layer, parts in layers.items():
        order = FUSED.get(layer.rpartition(".")[2], ())
        layers[layer] = {name: parts[name] for name in sorted(parts, key=lambda name: _place(name, order))}
    return layers


def _place(name: str, order: tuple[str, ...]) -> int:
    last = name.rpartition(".")[2]
    return order.index(last) if last in order else 0


def _slice(name: str, size: tuple[int, int], pair: dict[str, Tensor] | None, scale: float, max_rank: int) -> Tensor:
    """Copy A and B into a layer's zeroed buffers of the server's rank, as `set_lora` does, and multiply them."""
    rows, columns = size
    a, b = torch.zeros(max_rank, columns, dtype=torch.float64), torch.zeros(rows, max_rank, dtype=torch.float64)
    if pair is None:
        return b @ a
    if pair.keys() != {"lora_A", "lora_B"} or pair["lora_A"].shape[1] != columns or pair["lora_B"].shape[0] != rows:
        raise ValueError(f"{name}: expected A [r, {columns}] and B [{rows}, r]")
    if pair["lora_A"].shape[0] != pair["lora_B"].shape[1] or pair["lora_A"].shape[0] > max_rank:
        raise ValueError(f"{name}: ranks {pair['lora_A'].shape[0]} and {pair['lora_B'].shape[1]}")
    a[: pair["lora_A"].shape[0]] = pair["lora_A"]
    b[:, : pair["lora_B"].shape[1]] = pair["lora_B"] * scale
    return b @ a
