"""Arguments in a file of the reference: the fields of its pickled dataclasses, and the reference's defaults for older files."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2l.errors import CheckpointError
from d2l.reference.inert_pickle import SavedDataclass, TensorReference, TorchFile

DATACLASSES = (
    "ctx_to_lora.configs.CtxEncoderArguments",
    "ctx_to_lora.modeling.aggregator.AggregatorConfig",
    "ctx_to_lora.modeling.hypernet.HypernetConfig",
    "peft.tuners.lora.config.LoraConfig",
    "peft.tuners.lora.config.LoraRuntimeConfig",
)
ENUMS = ("peft.utils.peft_types.PeftType",)

_LORA_FIELDS = ("r", "target_modules", "lora_alpha", "lora_dropout")  # the reference reads no other fields of PEFT's

# What the reference takes for an argument that a file lacks. The first two it sets while it loads, where they are absent or
# None, and they differ from the defaults of its training (4 against 1 layer). The others are defaults of the dataclass,
# which Python finds on the class of an object that was pickled before it had the field.
_SET_WHILE_LOADING: Mapping[str, Any] = {
    "hypernet_config.num_pre_head_layers": 4,
    "hypernet_config.use_bias": True,
}
_OF_THE_DATACLASS: Mapping[str, Any] = {
    "ctx_encoder_args.ctx_encoder_model_name_or_path": None,
    "ctx_encoder_args.ctx_encoder_type": "early_exit",
    "ctx_encoder_args.layer_idx": None,
    "ctx_encoder_args.quantize_ctx_encoder": False,
    "ctx_encoder_args.ctx_encoder_last_layer": None,
}

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 2, 80


class Fields(dict[str, Any]):
    """Mapping from `dataclass.field` to its value; a missing key is a `CheckpointError` that names it.

    Attributes:
        file: the file that they are of.
        notes: a line for each argument that the file lacks, with the value that is taken.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.notes: list[str] = []

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(
            f"{self.file} has no {key}: expected what the reference's trainer saves; it is of another version or of a "
            "fork, which d2l cannot import"
        )


def read_fields(source: TorchFile, state: Mapping[str, Any]) -> Fields:
    """Read the fields of all four dataclasses, layer indices as a list.

    Args:
        state: the state dict in the file, names without prefixes.

    Raises:
        CheckpointError: a dataclass is missing.
    """
    fields = Fields(source.path)
    hypernet = _read_dataclass(source, state, "hypernet_config")
    for name, holder in (
        ("hypernet_config", state),
        ("ctx_encoder_args", state),
        ("aggregator_config", hypernet),
        ("lora_config", hypernet),
    ):
        for key, value in _read_dataclass(source, holder, name).items():
            if not isinstance(value, SavedDataclass) and (name != "lora_config" or key in _LORA_FIELDS):
                fields[f"{name}.{key}"] = value
    _add_defaults(fields)
    layers = fields["hypernet_config.layer_indices"]
    if isinstance(layers, TensorReference):
        fields["hypernet_config.layer_indices"] = source.read_tensor(layers).tolist()
    return fields


def _add_defaults(fields: Fields) -> None:
    """Add the arguments that the file lacks, and note each."""
    lacking = {key: value for key, value in _SET_WHILE_LOADING.items() if fields.get(key) is None}
    lacking |= {key: value for key, value in _OF_THE_DATACLASS.items() if key not in fields}
    fields.update(lacking)
    fields.notes += [
        f"{key} has no value in the file: taken as {value}, as the reference does with files older than it"
        for key, value in lacking.items()
    ]


def _read_dataclass(source: TorchFile, holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the fields of a dataclass in `holder`.

    Raises:
        CheckpointError: it is missing.
    """
    found = holder.get(name)
    if not isinstance(found, SavedDataclass):
        raise CheckpointError(
            f"{source.path}: no {name} in it; expected a checkpoint of the reference's trainer, a pytorch_model.bin with "
            "hypernet_config, ctx_encoder_args and base_model_name_or_path beside the tensors"
        )
    return found.values


def short(value: Any) -> str:
    """Format a value of the file in bounded length: a few bytes of pickle can nest lists without end."""
    return _REPR.repr(value)
