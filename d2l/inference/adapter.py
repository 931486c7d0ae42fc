"""Export of a document's LoRA as a PEFT adapter folder, for every tool that serves such adapters.

PEFT scales a delta by `lora_alpha / r`, d2l by `scale`: with the scale folded into B and `lora_alpha = r` both are equal,
whole numbers that every server takes.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from d2l.errors import CheckpointError, ModelError
from d2l.hypernet.lora import Lora
from d2l.hypernet.targets import MLP_BLOCK, find_targets, target_sizes
from d2l.inference.low_rank import refactor, relative_error
from d2l.inference.servers import AdapterForm, missing_modules
from d2l.io.atomic import require_new_folder, write_new_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names

NO_FORMAT = (
    f"PEFT and vLLM have no adapter format for {MLP_BLOCK}, which runs beside a whole block and changes no weight"
)


@dataclass(frozen=True)
class ShapedLora:
    """A LoRA as it is written.

    Attributes:
        lora: scale 1, in the dtype of the file.
        error: largest relative error of a delta that a smaller rank and its rounding cost; 0 with the ranks as generated.
        refactored: whether the rank is smaller than generated, so that rows no longer belong to chunks.
    """

    lora: Lora
    error: float
    refactored: bool


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


def export_adapter(
    lora: Lora,
    base: PreTrainedModel,
    folder: Path | str,
    base_model_name: str | None = None,
    form: AdapterForm | None = None,
) -> int:
    """Write `adapter_model.safetensors` and `adapter_config.json`, chunks and bias along one rank, without padding.

    Args:
        lora: LoRA of one context.
        base: the base model, only read.
        folder: a new folder.
        base_model_name: hub id or folder of the base, written into the adapter's config; default: the base's own.
        form: rank, dtype and modules of the file; default: as generated, in float32.

    Returns:
        The adapter's rank.

    Raises:
        CheckpointError: the folder exists or cannot be written, the LoRA is not finite, no adapter format supports a
            target module, or the rank of the form costs more than its bound.
        ModelError: the base lacks a target module.
    """
    if lora.n_contexts != 1:
        raise ValueError(f"an adapter holds the LoRA of one context, this one has {lora.n_contexts}")
    folder, form = Path(folder), form or AdapterForm()
    require_new_folder(folder)
    require_exportable(lora.A)
    try:
        require_finite(lora, base)
        shaped = shape_lora(_remove_padding(lora), form).lora
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from None
    name = str(base.name_or_path) if base_model_name is None else base_model_name
    with write_new_folder(folder, "adapter") as partial:
        write_adapter(shaped, base, partial, name, form)
    return shaped.rank


def require_finite(lora: Lora, base: PreTrainedModel) -> None:
    """Refuse a LoRA with values that are not finite.

    Raises:
        CheckpointError: the message names the first module.
    """
    finite = {
        name: (lora.A[name].isfinite().all(dim=(0, 2, 3)) & lora.B[name].isfinite().all(dim=(0, 2, 3))).tolist()
        for name in lora.A
    }
    if not all(all(layers) for layers in finite.values()):
        paths = {module: path for path, module in base.named_modules()}
        modules = find_targets(base, list(finite))
        broken = [paths[modules[name][i]] for name, layers in finite.items() for i, it in enumerate(layers) if not it]
        raise CheckpointError(f"the LoRA of {broken[0]} holds values that are not finite")


def shape_lora(lora: Lora, form: AdapterForm) -> ShapedLora:
    """Give a LoRA the rank and dtype of a form: by ranks of zeros where there is room, else by exact refactoring.

    Raises:
        CheckpointError: its deltas move by more than the form's bound.
    """
    folded = replace(lora, B={name: b * lora.scale for name, b in lora.B.items()}, scale=1.0)
    rank = form.rank_for(lora.rank)
    refactored = rank < lora.rank
    sized = refactor(folded, rank) if refactored else _pad(folded, rank)
    dtype = getattr(torch, form.dtype)
    A, B = ({name: x.detach().cpu().to(dtype) for name, x in side.items()} for side in (sized.A, sized.B))
    shaped = replace(sized, A=A, B=B)
    error = relative_error(shaped, folded) if refactored else 0.0
    if error > form.max_error:
        raise CheckpointError(
            f"rank {lora.rank} as rank {rank} moves a delta by {error:.2g} of its length, more than {form.max_error:g}: "
            "choose a larger --rank, a higher --max-error, or split the document"
        )
    return ShapedLora(shaped, error, refactored)


def write_adapter(lora: Lora, base: PreTrainedModel, folder: Path, base_model_name: str, form: AdapterForm) -> None:
    """Write the two files of an adapter, the same bytes for the same values, into a folder that exists.

    Args:
        lora: from `shape_lora`.

    Raises:
        ModelError: the base lacks a target module.
        OSError, SafetensorError: a file cannot be written.
    """
    if form.server == "sglang":
        lora = _with_zeros(lora, base)
    paths = {module: path for path, module in base.named_modules()}
    tensors: dict[str, Tensor] = {}
    for name, modules in find_targets(base, list(lora.A)).items():
        for module, a, b in zip(modules, lora.A[name][0], lora.B[name][0], strict=True):
            prefix = f"base_model.model.{paths[module]}"
            tensors |= {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.mT.contiguous()}

    from peft import LoraConfig, TaskType  # imported late: it takes seconds

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank,
        lora_dropout=0.0,
        target_modules=_target_names(base, tensors, list(lora.A)),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
    )
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # more keys would stand in an order of chance
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # PEFT writes a set
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def _pad(lora: Lora, rank: int) -> Lora:
    """Add ranks of zeros up to a rank."""
    room = (0, 0, 0, rank - lora.rank)
    A, B = ({name: functional.pad(x, room) for name, x in side.items()} for side in (lora.A, lora.B))
    return replace(lora, A=A, B=B)


def _with_zeros(lora: Lora, base: PreTrainedModel) -> Lora:
    """Add zeros for the modules of the base that SGLang stacks with an adapted one."""
    A, B = dict(lora.A), dict(lora.B)
    for name in missing_modules(lora.A):
        try:
            sizes = target_sizes(find_targets(base, [name]), base.config.hidden_size)[name]
        except ModelError:  # the base has no such Linear, so there is nothing to stack
            continue
        some = next(iter(lora.A.values()))
        A[name], B[name] = (some.new_zeros(*some.shape[:3], size) for size in sizes)
    return replace(lora, A=A, B=B)


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
