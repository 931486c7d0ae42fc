"""Checkpoints of the reference implementation (`pytorch_model.bin`) as checkpoint folders of d2l.

The reference saves its configuration as pickled dataclasses between the tensors. They are read without unpickling
(`d2l.reference.inert_pickle`), held against what d2l can do, and resolved into a configuration of ours. Parameters have the same
names on both sides, so the numbers go over as they are.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from d2l.checkpoint import Checkpoint, require_fitting, save_checkpoint
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.schema import RunConfig
from d2l.data.records import listing
from d2l.errors import CheckpointError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape
from d2l.io.atomic import require_absent
from d2l.reference.inert_pickle import OrderedMapping, SavedDataclass, TensorReference, TorchFile

_RECORDS = (
    "ctx_to_lora.configs.CtxEncoderArguments",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
)
_ENUMS = ("peft.utils.peft_types.PeftType",)

# Fields of the reference's dataclasses that are keys of our configuration, under the same name.
_SHARED = (
    *("hypernet_config.latent_size", "hypernet_config.use_bias", "hypernet_config.per_rank_gen"),
    *("hypernet_config.per_layer_processing", "hypernet_config.num_pre_head_layers"),
    *("aggregator_config.n_latent_queries", "aggregator_config.num_blocks"),
    *("aggregator_config.num_self_attn_per_block", "aggregator_config.shared_weights"),
    *("ctx_encoder_args.ctx_encoder_type", "lora_config.target_modules"),
)
# Fields that are sizes of the base, or that no comparison is needed for.
_READ = (
    *("hypernet_config.feature_sizes", "hypernet_config.base_hidden_size", "hypernet_config.layer_indices"),
    *("lora_config.r", "ctx_encoder_args.layer_idx"),
)
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_LORA_FIELDS = ("r", "target_modules", "lora_alpha", "lora_dropout")  # the reference reads no others of PEFT's


def import_reference(file: Path, folder: Path) -> None:
    """Turn a checkpoint of the reference into one that `internalize` and `ask` take.

    Limits on documents and questions are no part of such a file; the folder has the defaults of `RunConfig`.

    Args:
        file: `pytorch_model.bin`, as the reference's trainer saves it.
        folder: new.

    Raises:
        CheckpointError: the folder exists; the file is damaged, names code, or holds a model that d2l cannot be.
    """
    require_absent(folder)
    with TorchFile(file, _RECORDS, _ENUMS) as source:
        if not isinstance(source.root, OrderedMapping) or not all(isinstance(name, str) for name in source.root):
            raise CheckpointError(f"{file}: expected a state dict, a mapping from names to tensors")
        fields, base_name = _read_fields(source), source.root.get("base_model_name_or_path")
        tensors = {name: source.tensor(it) for name, it in source.root.items() if isinstance(it, TensorReference)}
    config = _run_config(fields, base_name)
    shape = _shape(fields, config)
    if problems := _disagreements(fields, config, shape):
        raise _not_ours(file, problems)
    _require_fitting(shape, tensors, file)
    base = {"hidden_size": shape.feature_size, "num_hidden_layers": shape.n_layers}
    state = {"config": config.resolved(), "base": base, "imported_from": str(file)}
    save_checkpoint(folder, Checkpoint(hypernet=tensors, trainer={}, state=state))


class _Fields(dict[str, Any]):
    """`dataclass.field` → value; a missing one is named."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.file} has no {key}; it is of another version of the reference")


def _read_fields(source: TorchFile) -> _Fields:
    """The fields of all four dataclasses; layer indices as a list."""
    fields = _Fields(source.path)
    hypernet = _record(source, source.root, "hypernet_config")
    for name, holder in (
        ("hypernet_config", source.root),
        ("ctx_encoder_args", source.root),
        ("aggregator_config", hypernet),
        ("lora_config", hypernet),
    ):
        for key, value in _record(source, holder, name).items():
            if not isinstance(value, SavedDataclass) and (name != "lora_config" or key in _LORA_FIELDS):
                fields[f"{name}.{key}"] = value
    layers = fields["hypernet_config.layer_indices"]
    if isinstance(layers, TensorReference):
        fields["hypernet_config.layer_indices"] = source.tensor(layers).tolist()
    return fields


def _record(source: TorchFile, holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    record = holder.get(name)
    if not isinstance(record, SavedDataclass):
        raise CheckpointError(f"{source.path}: no {name} in it; expected a checkpoint of the reference's trainer")
    return record.values


def _run_config(fields: _Fields, base_name: Any) -> RunConfig:
    """Our configuration with the file's values."""
    values = {key.rpartition(".")[2]: fields[key] for key in _SHARED}
    is_early = values["ctx_encoder_type"] == "early_exit"  # the reference reads layer_idx for no other type
    try:
        return RunConfig(
            model_name_or_path=base_name,
            lora_r=fields["lora_config.r"],
            layer_idx=fields["ctx_encoder_args.layer_idx"] if is_early else None,
            **values,
        )
    except ValidationError as error:
        problems = [f"{it['loc'][0]}: {it['msg']}, found {_short(it['input'])}" for it in error.errors()]
        raise _not_ours(fields.file, problems) from None


def _shape(fields: _Fields, config: RunConfig) -> HypernetShape:
    """The sizes that the file states."""
    sizes, layers = fields["hypernet_config.feature_sizes"], fields["hypernet_config.layer_indices"]
    hidden_size = fields["hypernet_config.base_hidden_size"]
    problems = []
    modules: dict[str, tuple[int, int]] = {}
    match sizes:
        case (dict(d_in), dict(d_out)) if d_in.keys() == d_out.keys() == set(config.target_modules):
            modules = {name: (d_in[name], d_out[name]) for name in config.target_modules}
    numbers = [hidden_size, *(size for pair in modules.values() for size in pair)]
    if not modules or not all(type(number) is int and 0 < number < 2**31 for number in numbers):
        problems.append(
            f"hypernet_config.feature_sizes and base_hidden_size: expected sizes of {', '.join(config.target_modules)}, "
            f"found {_short(sizes)} and {_short(hidden_size)}"
        )
    if not isinstance(layers, list) or not layers or layers != list(range(len(layers))):
        problems.append(f"hypernet_config.layer_indices: expected every layer in order, found {_short(layers)}")
    if problems:
        raise _not_ours(fields.file, problems)
    return HypernetShape(config=config, modules=modules, n_layers=len(layers), feature_size=hidden_size)


def _disagreements(fields: _Fields, config: RunConfig, shape: HypernetShape) -> list[str]:
    """Fields whose value would make another model than ours: each with what is expected."""
    expected: dict[str, tuple[Any, ...]] = {
        "lora_config.lora_alpha": (shape.scale,),
        "lora_config.lora_dropout": (0.0,),
        "aggregator_config.lora_r": (config.lora_r,),
        "aggregator_config.per_rank_gen": (config.per_rank_gen,),
        "aggregator_config.output_size": (config.latent_size,),
        "aggregator_config.feature_size": (shape.feature_size,),
        "aggregator_config.num_layers": (shape.n_layers,),
        "aggregator_config.num_modules": (len(shape.modules),),
        "aggregator_config.num_extra_modules": (0,),
        "aggregator_config.layer_to_layer_ctx_encoder": (shape.per_layer_features,),
        "ctx_encoder_args.ctx_encoder_model_name_or_path": (None, config.model_name_or_path),
        "ctx_encoder_args.ctx_encoder_last_layer": (None, shape.n_layers),  # it cuts above features that nobody reads
        "ctx_encoder_args.quantize_ctx_encoder": (False,),
    }
    problems = []
    for key in [*fields, *(key for key in expected if key not in fields)]:
        name = key.rpartition(".")[2]
        if key in (*_SHARED, *_READ) or name in HAS_NO_EFFECT:
            continue
        # a switch of a fork, or of a later version, is taken to be off where it is empty
        accepted = expected.get(key) or UNSUPPORTED.get(name, ((None, False, 0), ""))[0]
        if not _is_one_of(fields[key], accepted):
            wanted = " or ".join(map(_short, accepted))
            problems.append(f"{key}: expected {wanted}, found {_short(fields[key])}")
    return problems


def _require_fitting(shape: HypernetShape, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare the tensors with the parameters of a hypernetwork of this shape, which is made without memory."""
    config = shape.config
    if max(config.num_blocks, config.num_self_attn_per_block, config.num_pre_head_layers) > len(tensors):
        raise CheckpointError(f"{file}: its configuration describes more layers than it has tensors")
    try:
        with torch.device("meta"):
            hypernet = Hypernetwork(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: its configuration describes no model: {error!s:.200}") from error
    require_fitting(hypernet, tensors)


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    if isinstance(value, float):  # lora_alpha is computed on both sides
        return any(isinstance(it, int | float) and math.isclose(value, it) for it in accepted)
    return value in accepted


def _not_ours(file: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"{file} holds a model that d2l cannot be:\n{listing(problems)}")


def _short(value: Any) -> str:
    """A value of the file, bounded: a few bytes of pickle can nest lists beyond any memory."""
    return _REPR.repr(value)
