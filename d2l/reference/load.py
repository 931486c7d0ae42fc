"""Import of the reference implementation's checkpoints (`pytorch_model.bin`) as checkpoint folders of d2l.

The reference saves its configuration as pickled dataclasses beside the tensors. They are read without executing the
pickle (`d2l.reference.inert_pickle`), compared with what d2l supports, and resolved into a `RunConfig`. Parameters have
the same names on both sides, so tensors are copied unchanged.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from d2l.checkpoint import Checkpoint, require_matching_parameters, save_checkpoint
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.schema import RunConfig
from d2l.data.records import listing
from d2l.errors import CheckpointError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape
from d2l.io.atomic import require_new_folder
from d2l.reference.inert_pickle import OrderedMapping, SavedDataclass, TensorReference, TorchFile

_DATACLASSES = (
    "ctx_to_lora.configs.CtxEncoderArguments",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
)
_ENUMS = ("peft.utils.peft_types.PeftType",)

# Fields of the reference's dataclasses that are keys of `RunConfig`, under the same name.
_SHARED = (
    *("hypernet_config.latent_size", "hypernet_config.use_bias", "hypernet_config.per_rank_gen"),
    *("hypernet_config.per_layer_processing", "hypernet_config.num_pre_head_layers"),
    *("aggregator_config.n_latent_queries", "aggregator_config.num_blocks"),
    *("aggregator_config.num_self_attn_per_block", "aggregator_config.shared_weights"),
    *("ctx_encoder_args.ctx_encoder_type", "lora_config.target_modules"),
)
# Fields that are read elsewhere, so that they need no comparison.
_READ = (
    *("hypernet_config.feature_sizes", "hypernet_config.base_hidden_size", "hypernet_config.layer_indices"),
    *("lora_config.r", "ctx_encoder_args.layer_idx"),
)
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_LORA_FIELDS = ("r", "target_modules", "lora_alpha", "lora_dropout")  # the reference reads no other fields of PEFT's


def import_reference(file: Path, folder: Path) -> None:
    """Convert a checkpoint of the reference into a checkpoint folder for `internalize` and `ask`.

    The file holds no limits on documents and questions; the folder has the defaults of `RunConfig`.

    Args:
        file: `pytorch_model.bin`, as the reference's trainer saves it.
        folder: a new folder.

    Raises:
        CheckpointError: the folder exists; the file is damaged, names code, or holds a model that d2l does not support.
    """
    require_new_folder(folder)
    with TorchFile(file, _DATACLASSES, _ENUMS) as source:
        if not isinstance(source.root, OrderedMapping) or not all(isinstance(name, str) for name in source.root):
            raise CheckpointError(f"{file}: expected a state dict, a mapping from names to tensors")
        fields, base_name = _read_fields(source), source.root.get("base_model_name_or_path")
        tensors = {name: source.read_tensor(it) for name, it in source.root.items() if isinstance(it, TensorReference)}
    config = _make_config(fields, base_name)
    shape = _read_shape(fields, config)
    if problems := _list_differences(fields, config, shape):
        raise _unsupported_error(file, problems)
    _require_matching_parameters(shape, tensors, file)
    base = {"hidden_size": shape.feature_size, "num_hidden_layers": shape.n_layers}
    state = {"config": config.resolved(), "base": base, "imported_from": str(file)}
    save_checkpoint(folder, Checkpoint(hypernet=tensors, trainer={}, state=state))


class _Fields(dict[str, Any]):
    """Mapping from `dataclass.field` to its value; a missing key is a `CheckpointError` that names it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.file} has no {key}; it is of another version of the reference")


def _read_fields(source: TorchFile) -> _Fields:
    """Read the fields of all four dataclasses, layer indices as a list."""
    fields = _Fields(source.path)
    hypernet = _read_dataclass(source, source.root, "hypernet_config")
    for name, holder in (
        ("hypernet_config", source.root),
        ("ctx_encoder_args", source.root),
        ("aggregator_config", hypernet),
        ("lora_config", hypernet),
    ):
        for key, value in _read_dataclass(source, holder, name).items():
            if not isinstance(value, SavedDataclass) and (name != "lora_config" or key in _LORA_FIELDS):
                fields[f"{name}.{key}"] = value
    layers = fields["hypernet_config.layer_indices"]
    if isinstance(layers, TensorReference):
        fields["hypernet_config.layer_indices"] = source.read_tensor(layers).tolist()
    return fields


def _read_dataclass(source: TorchFile, holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the fields of a dataclass in `holder`.

    Raises:
        CheckpointError: it is missing.
    """
    found = holder.get(name)
    if not isinstance(found, SavedDataclass):
        raise CheckpointError(f"{source.path}: no {name} in it; expected a checkpoint of the reference's trainer")
    return found.values


def _make_config(fields: _Fields, base_name: Any) -> RunConfig:
    """Make a `RunConfig` with the file's values.

    Raises:
        CheckpointError: a value is not valid.
    """
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
        raise _unsupported_error(fields.file, problems) from None


def _read_shape(fields: _Fields, config: RunConfig) -> HypernetShape:
    """Read the sizes of the hypernetwork.

    Raises:
        CheckpointError: the file states no valid sizes.
    """
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
        raise _unsupported_error(fields.file, problems)
    return HypernetShape(config=config, modules=modules, n_layers=len(layers), feature_size=hidden_size)


def _list_differences(fields: _Fields, config: RunConfig, shape: HypernetShape) -> list[str]:
    """List the fields whose values d2l does not support, one line each with the expected value."""
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
        "ctx_encoder_args.ctx_encoder_last_layer": (None, shape.n_layers),  # it removes layers above the features
        "ctx_encoder_args.quantize_ctx_encoder": (False,),
    }
    problems = []
    for key in [*fields, *(key for key in expected if key not in fields)]:
        name = key.rpartition(".")[2]
        if key in (*_SHARED, *_READ) or name in HAS_NO_EFFECT:
            continue
        # an unknown field, of a fork or a later version, counts as off where it is empty
        accepted = expected.get(key) or UNSUPPORTED.get(name, ((None, False, 0), ""))[0]
        if not _is_one_of(fields[key], accepted):
            values = " or ".join(map(_short, accepted))
            problems.append(f"{key}: expected {values}, found {_short(fields[key])}")
    return problems


def _require_matching_parameters(shape: HypernetShape, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare the tensors with the parameters of a hypernetwork of this shape, on the meta device."""
    config = shape.config
    if max(config.num_blocks, config.num_self_attn_per_block, config.num_pre_head_layers) > len(tensors):
        raise CheckpointError(f"{file}: its configuration describes more layers than it has tensors")
    try:
        with torch.device("meta"):
            hypernet = Hypernetwork(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: its configuration describes no model: {error!s:.200}") from error
    require_matching_parameters(hypernet, tensors)


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    """Return whether a value is accepted; floats are compared with a tolerance."""
    if isinstance(value, float):  # lora_alpha is computed on both sides
        return any(isinstance(it, int | float) and math.isclose(value, it) for it in accepted)
    return value in accepted


def _unsupported_error(file: Path, problems: list[str]) -> CheckpointError:
    """Make the error that lists why a model is not supported."""
    return CheckpointError(f"{file} holds a model that d2l does not support:\n{listing(problems)}")


def _short(value: Any) -> str:
    """Format a value of the file in bounded length: a few bytes of pickle can nest lists without end."""
    return _REPR.repr(value)
