"""Files of a base model: find them, read them tensor by tensor, and write the layout of the official checkpoints."""

import json
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from d2l.base.mxfp4 import SCALE_BYTES
from d2l.errors import ModelError
from d2l.io.hub import from_cache_or_hub
from d2l.io.resources import local_or_shipped, resource

TINY = "configs/models/tiny_gpt_oss"
LOADING_FAILURES = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
_DTYPES = {  # names of safetensors: those that weights have, and what is laid out in bytes
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
_INDEX, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_NOT_MXFP4 = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def is_config_only(name_or_path: str) -> bool:
    """Return whether the base has no weights by design, and is random: a config file, or the shipped tiny model."""
    source = local_or_shipped(name_or_path)
    return source is not None and (source.is_file() or source.resolve() == resource(TINY).resolve())


def weights_folder(name_or_path: str) -> Path:
    """Return the local folder with the safetensors files, downloaded first where the name is a hub id.

    Raises:
        ModelError: there are none.
    """
    source = local_or_shipped(name_or_path)
    if source is None:
        try:
            source = from_cache_or_hub(partial(_snapshot, name_or_path), name_or_path)
        except LOADING_FAILURES as error:
            raise ModelError(
                f"no weights of {name_or_path!r}: not in the cache, and the hub cannot be reached. Download them first "
                f"(`hf download {name_or_path}`) or give a local folder. {first_line(error)}"
            ) from error
    if not _has_weights(source):
        raise ModelError(
            f"{source} holds neither {_SINGLE_FILE} nor {_INDEX}. For a random base, give the config file itself "
            f"({source / 'config.json'})."
        )
    return source


def has_weights_here(name_or_path: str) -> bool:
    """Return whether `weights_folder` would look on this machine: for a folder, or for what the hub's cache holds."""
    if local_or_shipped(name_or_path) is not None:
        return True
    try:
        return _has_weights(_snapshot(name_or_path, True))
    except LOADING_FAILURES:
        return False


def _snapshot(name: str, local_files_only: bool) -> Path:
    """Return the folder of a repository of the hub, without files that are not needed."""
    patterns = ["config.json", "generation_config.json", "model*.safetensors", _INDEX]
    return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (_INDEX, _SINGLE_FILE))


def read_tensors(folder: Path, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint with its name, one at a time, on its device; floating point as `dtype`.

    Raises:
        ModelError: a file is absent or damaged.
    """

    if device == "cuda":  # safetensors takes it for the first GPU, whichever is this process's
        device = f"cuda:{torch.cuda.current_device()}"

    def read(file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _each_tensor(folder, device, read)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by its name, on the meta device: shape and dtype without values.

    Raises:
        ModelError: a file is absent, cut short or damaged, or holds tensors of an unknown kind.
    """

    def read(file: Any, name: str) -> Tensor:
        entry = file.get_slice(name)
        dtype = getattr(torch, _DTYPES.get(entry.get_dtype(), ""), None)
        if dtype is None:
            expected = ", ".join(_DTYPES)
            raise ModelError(f"{folder}: {name} is of the unknown kind {entry.get_dtype()}; expected {expected}")
        return torch.empty(entry.get_shape(), dtype=dtype, device="meta")

    return dict(_each_tensor(folder, "cpu", read))


def _each_tensor(folder: Path, device: str, read: Callable[[Any, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of every tensor of a checkpoint with what `read` takes of it from its open file."""
    for file in sorted(set(_shards(folder).values())) or [_SINGLE_FILE]:
        try:
            with safe_open(folder / file, framework="pt", device=device) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                    yield name, read(tensors, name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{folder / file} is missing or damaged: fetch the checkpoint again. {first_line(error)}"
            ) from error


def _shards(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, by the index; empty where there is a single file."""
    index = folder / _INDEX
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is no index of weights: fetch the checkpoint again. {first_line(error)}") from error


def refuse_misfit(folder: Path, name: str, tensor: Tensor, place: Tensor) -> None:
    """Raise ModelError where a tensor is not of its place's shape and kind, or scales MXFP4 beyond all numbers."""
    kinds = [it.is_floating_point() or it.dtype for it in (tensor, place)]
    if tensor.shape != place.shape or kinds[0] != kinds[1]:
        expected, actual = (f"{str(it.dtype).removeprefix('torch.')} {list(it.shape)}" for it in (place, tensor))
        problem = f"must be {expected} to fit config.json. Got {actual}. Take both from one model's checkpoint."
    elif name.endswith("_scales") and not tensor.is_meta and (largest := int(tensor.max())) >= SCALE_BYTES:
        problem = f"must hold bytes below {SCALE_BYTES}; others make infinite numbers. Got {largest}. Fetch the checkpoint again."
    else:
        return
    raise ModelError(f"{folder / _shards(folder).get(name, _SINGLE_FILE)}: {name} {problem}")


def refuse_incomplete(folder: Path, missing: Collection[object], unexpected: Collection[object]) -> None:
    """Raise ModelError where names in the files and names in the model differ: such a model would be partly random."""
    found = {"missing": missing, "unexpected": unexpected}
    if lines := [f"{len(names)} {kind} (such as {min(map(str, names))})" for kind, names in found.items() if names]:
        raise ModelError(
            f"{folder}: the weights are not those that config.json describes: {' and '.join(lines)}. What is missing "
            f"would be random. {_remedy(unexpected)}"
        )


def _remedy(unexpected: Collection[object]) -> str:
    """Say what to change where names differ."""
    if any(str(name).endswith("_scales") for name in unexpected):  # a dequantized model is saved with *_blocks alone
        return (
            "The files hold MXFP4 (*_blocks, *_scales), and config.json has no quantization_config that says so: add "
            '"quantization_config": {"quant_method": "mxfp4"} to it, or take it from the original checkpoint.'
        )
    return "Use a complete checkpoint; save a dequantized model with save_original_format=False."


def save_mxfp4(base: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write a base whose experts are packed as an official checkpoint: config, `*_blocks`, `*_scales` and the rest."""
    config = deepcopy(base.config)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_MXFP4}
    config.save_pretrained(folder)
    save_torch_state_dict(base.state_dict(), folder, max_shard_size=max_shard_size)


def first_line(error: Exception) -> str:
    """Shorten a library's error to one line that can end a message of ours."""
    return shorten(f"{type(error).__name__}: {error}", width=300)
