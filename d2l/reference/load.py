"""Import of the reference implementation's checkpoints (`pytorch_model.bin`) as checkpoint folders of d2l.

The reference saves its configuration as pickled dataclasses beside the tensors. They are read without executing the
pickle (`d2l.reference.inert_pickle`), compared with what d2l supports, and resolved into a `RunConfig`. Parameters have
the same names on both sides, so tensors are copied unchanged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2l.checkpoint import Checkpoint, save_checkpoint
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.schema import RunConfig
from d2l.data.records import listing
from d2l.errors import CheckpointError
from d2l.hypernet.shape import HypernetShape
from d2l.io.atomic import require_new_folder
from d2l.reference.fields import DATACLASSES, ENUMS, Fields, read_fields, short
from d2l.reference.inert_pickle import TensorReference, TorchFile
from d2l.reference.parameters import require_parameters, without_compiled_names, without_unused_biases

_ENTRIES = {"base_model_name_or_path", "hypernet_config", "ctx_encoder_args"}  # of the state dict, beside the tensors
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

_QUANTIZED_ENCODER = (
    "quantize_ctx_encoder is true: the reference reads documents with a base in 4 bits (NF4), d2l with the base as it is "
    "loaded, so generated adapters come close to the reference's and are not equal to them"
)


@dataclass(frozen=True)
class ReferenceModel:
    """Model that a file of the reference describes.

    Attributes:
        shape: configuration and sizes, as d2l has them.
        parameters: name in d2l → where the tensor lies in the file; exactly those of a hypernetwork of this shape.
        notes: what is taken otherwise than the file says it, one line each.
    """

    shape: HypernetShape
    parameters: Mapping[str, TensorReference]
    notes: tuple[str, ...]


def import_reference(file: Path, folder: Path) -> tuple[str, ...]:
    """Convert a checkpoint of the reference into a checkpoint folder for `internalize` and `ask`.

    The file holds no limits on documents and questions; the folder has the defaults of `RunConfig`.

    Args:
        file: `pytorch_model.bin`, as the reference's trainer saves it.
        folder: a new folder.

    Returns:
        What was taken otherwise than the file says it, one line each.

    Raises:
        CheckpointError: the folder exists; the file is damaged, names code, or holds a model that d2l does not support.
    """
    require_new_folder(folder)
    with TorchFile(file, DATACLASSES, ENUMS) as source:
        model = describe_reference(source)
        tensors = {name: source.read_tensor(it) for name, it in model.parameters.items()}
    shape = model.shape
    base = {"hidden_size": shape.feature_size, "num_hidden_layers": shape.n_layers}
    state = {"config": shape.config.resolved(), "base": base, "imported_from": str(file), "import_notes": model.notes}
    save_checkpoint(folder, Checkpoint(hypernet=tensors, trainer={}, state=state))
    return model.notes


def describe_reference(source: TorchFile) -> ReferenceModel:
    """Read what a file of the reference describes, without reading a parameter; memory does not grow with the model.

    Raises:
        CheckpointError: arguments, names or shapes are not those of one model that d2l supports.
    """
    file = source.path
    if not isinstance(source.root, dict) or not all(isinstance(name, str) for name in source.root):
        raise CheckpointError(
            f"{file}: expected a state dict, a mapping from names to tensors, found {short(source.root)}; import the "
            "pytorch_model.bin that the reference's trainer wrote"
        )
    state, renamed = without_compiled_names(source.root, file)
    fields = read_fields(source, state)
    config = _make_config(fields, state.get("base_model_name_or_path"))
    shape = _read_shape(fields, config)
    if problems := _list_differences(fields, config, shape):
        raise _unsupported_error(file, problems)
    tensors = {name: it for name, it in state.items() if isinstance(it, TensorReference)}
    if others := sorted(state.keys() - tensors.keys() - _ENTRIES):
        raise _unsupported_error(
            file, [f"{short(name)}: expected a tensor, found {short(state[name])}" for name in others]
        )
    parameters, unused = without_unused_biases(tensors, shape)
    require_parameters(parameters, shape, file)
    quantized = [_QUANTIZED_ENCODER] if fields["ctx_encoder_args.quantize_ctx_encoder"] else []
    return ReferenceModel(shape, parameters, (*renamed, *fields.notes, *unused, *quantized))


def _make_config(fields: Fields, base_name: Any) -> RunConfig:
    """Make a `RunConfig` with the file's values.

    Raises:
        CheckpointError: a value is not valid.
    """
    values = {key.rpartition(".")[2]: fields[key] for key in _SHARED}
    is_early = values["ctx_encoder_type"] == "early_exit"  # the reference reads layer_idx for no other type
    if is_early and fields["ctx_encoder_args.layer_idx"] is None:  # there all layers, here a quarter of them
        problem = (
            "ctx_encoder_args.layer_idx: expected the layer of the early exit, which its trainer saves, found None"
        )
        raise _unsupported_error(fields.file, [problem])
    try:
        return RunConfig(
            model_name_or_path=base_name,
            lora_r=fields["lora_config.r"],
            layer_idx=fields["ctx_encoder_args.layer_idx"] if is_early else None,
            **values,
        )
    except ValidationError as error:
        problems = [f"{it['loc'][0]}: {it['msg']}, found {short(it['input'])}" for it in error.errors()]
        raise _unsupported_error(fields.file, problems) from None


def _read_shape(fields: Fields, config: RunConfig) -> HypernetShape:
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
            f"found {short(sizes)} and {short(hidden_size)}"
        )
    if not isinstance(layers, list) or not layers or layers != list(range(len(layers))):
        problems.append(f"hypernet_config.layer_indices: expected every layer in order, found {short(layers)}")
    if problems:
        raise _unsupported_error(fields.file, problems)
    return HypernetShape(config=config, modules=modules, n_layers=len(layers), feature_size=hidden_size)


def _list_differences(fields: Fields, config: RunConfig, shape: HypernetShape) -> list[str]:
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
        "ctx_encoder_args.quantize_ctx_encoder": (False, True),
    }
    problems = []
    for key in [*fields, *(key for key in expected if key not in fields)]:
        name = key.rpartition(".")[2]
        if key in (*_SHARED, *_READ) or name in HAS_NO_EFFECT:
            continue
        # an unknown field, of a fork or a later version, counts as off where it is empty
        accepted = expected.get(key) or UNSUPPORTED.get(name, ((None, False, 0), ""))[0]
        if not _is_one_of(fields[key], accepted):
            values = " or ".join(map(short, accepted))
            problems.append(f"{key}: expected {values}, found {short(fields[key])}")
    return problems


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    """Return whether a value is accepted; floats are compared with a tolerance."""
    if isinstance(value, float):  # lora_alpha is computed on both sides
        return any(isinstance(it, int | float) and math.isclose(value, it) for it in accepted)
    return value in accepted


def _unsupported_error(file: Path, problems: list[str]) -> CheckpointError:
    """Make the error that lists why a model is not supported."""
    return CheckpointError(
        f"{file} holds a model that d2l does not support:\n{listing(problems)}\n"
        "train such a model with d2l, or import another checkpoint of the reference"
    )
