"""A file as the reference's trainer saves a checkpoint: torch's zip format with dataclasses between the tensors.

The pickle is put together opcode by opcode (protocol 2, as torch writes it), since the classes that it names do not
exist here. `Global`, `Call` and `Instance` stand for what Python's pickler would write of a class, a call and an object.
"""

import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2l.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_STORAGES = {"torch.float32": "FloatStorage", "torch.bfloat16": "BFloat16Storage", "torch.int64": "LongStorage"}


@dataclass(frozen=True)
class Global:
    """A class or function, by its qualified name."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of something, by its qualified name, with its arguments."""

    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Instance:
    """An object of a dataclass, by the class's qualified name, with its fields."""

    name: str
    fields: Mapping[str, Any]


def reference_state(
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    base_config: "PreTrainedConfig",
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Return what the reference would save of a hypernetwork with this configuration.

    Args:
        tensors: the hypernetwork's parameters; the reference saves biases whether they are used or not.
        sizes: (d_in, d_out) of each target module.
    """
    layers = base_config.num_hidden_layers
    hypernet = {
        "latent_size": config.latent_size,
        "use_light_weight_lora": False,
        "per_rank_gen": config.per_rank_gen,
        "use_bias": config.use_bias,
        "per_layer_processing": config.per_layer_processing,
        "num_pre_head_layers": config.num_pre_head_layers,
        "dropout_rate": 0.0,
        "lora_config": _lora_config(config),
        "base_hidden_size": base_config.hidden_size,
        "layer_indices": torch.arange(layers),
        "feature_sizes": tuple({name: sizes[name][side] for name in sorted(config.target_modules)} for side in (0, 1)),
        "aggregator_config": _aggregator_config(config, base_config),
    }
    encoder = {
        "ctx_encoder_model_name_or_path": None,
        "ctx_encoder_type": config.ctx_encoder_type,
        "layer_idx": layers // 4 if config.layer_idx is None else config.layer_idx,
        "quantize_ctx_encoder": False,
        "ctx_encoder_last_layer": None,
    }
    return {
        **_biases(config, layers, sizes),
        **tensors,
        "base_model_name_or_path": config.model_name_or_path,
        "hypernet_config": Instance("ctx_to_lora.modeling.hypernet.HypernetConfig", hypernet),
        "ctx_encoder_args": Instance("ctx_to_lora.configs.CtxEncoderArguments", encoder),
    }


def _biases(config: RunConfig, layers: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return biases [L, r, d] for every target module, as they lie in the file of a model that does not use them."""
    return {
        f"bias_{'AB'[side]}.{name}": torch.ones(layers, config.lora_r, sizes[name][side])
        for name in config.target_modules
        for side in (0, 1)
    }


def _lora_config(config: RunConfig) -> Instance:
    """Return the LoRA's part of what the reference saves."""
    fields = {
        "peft_type": Call("peft.utils.peft_types.PeftType", ("LORA",)),
        "r": config.lora_r,
        "target_modules": set(config.target_modules),
        "lora_alpha": 2 * config.lora_r**1.5,
        "lora_dropout": 0.0,
        "runtime_config": Instance("peft.tuners.lora.config.LoraRuntimeConfig", {"ephemeral_gpu_offload": False}),
    }
    return Instance("peft.tuners.lora.config.LoraConfig", fields)


def _aggregator_config(config: RunConfig, base_config: "PreTrainedConfig") -> Instance:
    """Return the aggregator's part of what the reference saves."""
    fields = {
        "aggregator_type": "perceiver",
        "num_layers": base_config.num_hidden_layers,
        "num_modules": len(set(config.target_modules)),
        "num_extra_modules": 0,
        "output_size": config.latent_size,
        "feature_size": base_config.hidden_size,
        "lora_r": config.lora_r,
        "per_rank_gen": config.per_rank_gen,
        "n_latent_queries": config.n_latent_queries,
        "num_blocks": config.num_blocks,
        "num_self_attn_per_block": config.num_self_attn_per_block,
        "shared_weights": config.shared_weights,
        "layer_to_layer_ctx_encoder": config.ctx_encoder_type == "per_layer_activations",
    }
    return Instance("ctx_to_lora.modeling.aggregator.AggregatorConfig", fields)


def write_reference_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write the file that `torch.save(state)` would write.

    Args:
        state: tensors, plain values, and the classes above; tensors in the order of their storages' numbers.
    """
    storages: list[Tensor] = []
    pickled = b"\x80\x02" + _pickled(Call("collections.OrderedDict"), storages) + _items(state, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        folder = path.stem
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", sys.byteorder)
        for key, tensor in enumerate(storages):
            archive.writestr(f"{folder}/data/{key}", tensor.flatten().view(torch.uint8).numpy().tobytes())
        archive.writestr(f"{folder}/version", "3\n")


def _pickled(value: Any, storages: list[Tensor]) -> bytes:
    """Return the opcodes that leave one value on the stack."""
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(_pickled(item, storages) for item in value) + b"t"
        case list():
            return b"](" + b"".join(_pickled(item, storages) for item in value) + b"e"
        case set():
            return _pickled(Call("__builtin__.set", (sorted(value),)), storages)
        case Tensor():
            return _pickled_tensor(value, storages)
        case Global(name):
            module, _, attribute = name.rpartition(".")
            return f"c{module}\n{attribute}\n".encode()
        case Call(name, arguments):
            return _pickled(Global(name), storages) + _pickled(arguments, storages) + b"R"
        case Instance(name, fields):
            return _pickled(Global(name), storages) + b")\x81" + _pickled(dict(fields), storages) + b"b"
        case dict():
            return b"}" + _items(value, storages)
    raise TypeError(f"a {type(value).__name__} in a checkpoint")


def _items(mapping: Mapping[Any, Any], storages: list[Tensor]) -> bytes:
    pairs = b"".join(_pickled(item, storages) for pair in mapping.items() for item in pair)
    return b"(" + pairs + b"u"


def _pickled_tensor(tensor: Tensor, storages: list[Tensor]) -> bytes:
    """Return the opcodes of a call of torch's rebuilder on a storage that is named by a persistent id."""
    storages.append(tensor)
    kind = Global(f"torch.{_STORAGES[str(tensor.dtype)]}")
    storage = _pickled(("storage", kind, str(len(storages) - 1), "cpu", tensor.numel()), storages) + b"Q"
    rest = (0, tuple(tensor.shape), tensor.contiguous().stride(), False, Call("collections.OrderedDict"))
    arguments = b"(" + storage + b"".join(_pickled(item, storages) for item in rest) + b"t"
    return _pickled(Global("torch._utils._rebuild_tensor_v2"), storages) + arguments + b"R"
