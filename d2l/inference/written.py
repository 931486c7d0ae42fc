"""Adapters that were written, read back: whether one is whole, and the LoRAs of the chunks in it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2l.hypernet.lora import Lora
from d2l.hypernet.targets import Targets, find_targets
from d2l.inference.adapter import WEIGHTS
from d2l.inference.cards import Card, file_sha256
from d2l.inference.load import TrainedModel


def is_whole(card: Card, folder: Path) -> bool:
    """Return whether an adapter's weights are those that were written."""
    try:
        return file_sha256(folder / WEIGHTS) == card.weights["sha256"]
    except OSError:
        return False


def read_rows(card: Card, folder: Path, trained: TrainedModel, wanted: set[str]) -> dict[str, Lora]:
    """Cut the rows of some chunks out of an adapter that was not refactored; none where its weights cannot be read.

    Args:
        wanted: hashes of chunks, see `chunk_hash`.

    Returns:
        LoRAs of one entry each, [1, L, r, d] in float32 and with scale 1, by the hashes.
    """
    base, rank = trained.model.base, trained.config.lora_r
    paths = {module: f"base_model.model.{path}" for path, module in base.named_modules()}
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError):
        return {}
    targets = find_targets(base, trained.config.target_modules)
    found = {}
    for number, key in enumerate(card.chunk_hashes):
        if key in wanted and key not in found:
            rows = slice(number * rank, (number + 1) * rank)
            A, B = (_stack(tensors, targets, paths, side, rows) for side in ("A", "B"))
            found[key] = Lora(A, B, 1.0)
    return found


def _stack(
    tensors: Mapping[str, Tensor], targets: Targets, paths: Mapping[nn.Module, str], side: str, rows: slice
) -> dict[str, Tensor]:
    """Return one side of a chunk's LoRA, [1, L, r, d] in float32, from the tensors of an adapter's file."""

    def layer(module: nn.Module) -> Tensor:
        tensor = tensors[f"{paths[module]}.lora_{side}.weight"]
        return (tensor if side == "A" else tensor.mT)[rows].float()

    return {name: torch.stack([layer(module) for module in modules])[None] for name, modules in targets.items()}
