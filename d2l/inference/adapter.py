"""Export of a document's LoRA as a PEFT adapter folder, for every tool that serves such adapters.

PEFT scales a delta by `lora_alpha / r`, d2l by `scale`: with `lora_alpha = scale · R` both are equal.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from d2l.errors import CheckpointError
from d2l.hypernet.lora import Lora
from d2l.hypernet.targets import MLP_BLOCK, find_targets
from d2l.io.atomic import require_new_folder, write_new_folder

NO_FORMAT = (
    f"PEFT and vLLM have no adapter format for {MLP_BLOCK}, which runs beside a whole block and changes no weight"
)


def require_exportable(names: Collection[str]) -> None:
    """Refuse target modules for which no adapter format exists.

    Raises:
        CheckpointError: the message names the modules and the reason.
    """
    if MLP_BLOCK in names:
        raise CheckpointError(
            f"no adapter can be written for target_modules [{', '.join(names)}]: {NO_FORMAT}\nuse the checkpoint with "
            "`d2l ask` and `d2l eval`; for an adapter train Linears, such as target_modules: [o_proj, v_proj]"
        )


def export_adapter(lora: Lora, base: PreTrainedModel, folder: Path | str, base_model_name: str | None = None) -> int:
    """Write `adapter_model.safetensors` and `adapter_config.json`, chunks and bias along one rank, without padding.

    Args:
        lora: LoRA of one context.
        base: the base model, only read.
        folder: a new folder.
        base_model_name: hub id or folder of the base, written into the adapter's config; default: the base's own.

    Returns:
        The adapter's rank.

    Raises:
        CheckpointError: the folder exists or cannot be written, the LoRA is not finite, or no adapter format supports a
            target module.
        ModelError: the base lacks a target module.
    """
    if lora.n_contexts != 1:
        raise ValueError(f"an adapter holds the LoRA of one context, this one has {lora.n_contexts}")
    folder = Path(folder)
    require_new_folder(folder)
    require_exportable(lora.A)
    lora = _remove_padding(lora)
    paths = {module: path for path, module in base.named_modules()}
    tensors: dict[str, Tensor] = {}
    for name, modules in find_targets(base, list(lora.A)).items():
        for module, a, b in zip(modules, lora.A[name][0], lora.B[name][0], strict=True):
            prefix = f"base_model.model.{paths[module]}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b.mT}
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise CheckpointError(f"cannot write {folder}: {broken[0]} holds values that are not finite")

    from peft import LoraConfig, TaskType  # imported late: it takes seconds
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # PEFT annotates int and divides
        lora_dropout=0.0,
        target_modules=_target_names(base, tensors, list(lora.A)),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base.name_or_path if base_model_name is None else base_model_name,
        inference_mode=True,
    )
    with write_new_folder(folder, "adapter") as partial:
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
    return lora.rank


def _remove_padding(lora: Lora) -> Lora:
    """Remove the ranks that are zero everywhere, which pad shorter contexts; a LoRA of zeros keeps one rank."""
    sides = [*lora.A.values(), *lora.B.values()]
    largest = torch.stack([side.detach().abs().amax(dim=(0, 1, 3)) for side in sides]).amax(dim=0)
    used = largest.nonzero().flatten().tolist() or [0]
    A, B = ({name: x[:, :, used] for name, x in side.items()} for side in (lora.A, lora.B))
    return Lora(A, B, lora.scale)


def _target_names(base: PreTrainedModel, tensors: dict[str, Tensor], names: list[str]) -> list[str]:
    """Return the modules' short names if PEFT matches exactly the adapted modules by them, else their full paths."""
    adapted = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    matching = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in names}
    return names if matching == adapted else sorted(adapted)
