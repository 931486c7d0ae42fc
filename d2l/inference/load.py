"""Loading of a trained checkpoint for inference: base, hypernetwork, chat format and configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2l.build import Components
from d2l.checkpoint import Checkpoint, FoundCheckpoint, find_checkpoint, load_checkpoint, load_hypernet
from d2l.config.load import saved_config
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.errors import CheckpointError, ConfigError, ModelError
from d2l.fingerprint import base_facts
from d2l.hypernet.model import DocToLora
from d2l.inference.demo import locate_checkpoint

_OTHER_BASE = "pass the base of its training: --model MODEL"


@dataclass(frozen=True)
class TrainedModel:
    """Trained model that answers questions about documents.

    Attributes:
        model: base and hypernetwork in eval mode, on the base's device.
        chat: chat format of the training.
        config: configuration of the training, with the present path of the base.
        source: the checkpoint that was loaded; None where it was made from something else.
    """

    model: DocToLora
    chat: ChatFormat
    config: RunConfig
    source: FoundCheckpoint | None = None


def load_model(place: Path | str, model: str | None = None) -> TrainedModel:
    """Load a checkpoint's base and its hypernetwork.

    Args:
        place: a checkpoint folder, a run's folder, whose newest valid checkpoint is loaded, or `demo` for the shipped one.
        model: present path or hub id of the base, if it differs from that in training.

    Raises:
        CheckpointError: there is no valid checkpoint, or it was trained on another base.
        ModelError: the base, its tokenizer or its chat template cannot be used.
    """
    source = find_checkpoint(locate_checkpoint(Path(place)))
    folder = source.folder
    checkpoint = load_checkpoint(folder)
    config = _read_config(checkpoint, folder, model)
    components = Components(config)
    try:
        base_config = components.base_config
    except ModelError as error:
        reason = str(error).splitlines()[0]  # the other lines advise on a run's configuration
        raise ModelError(f"{folder} needs its base model: {reason}\npass where it lies now: --model MODEL") from error
    found = base_facts(base_config)
    _require_same_base(folder, config.model_name_or_path, checkpoint.state.get("base", {}), found)
    try:
        return restore_model(components.model, components.chat, config, checkpoint, source)
    except (ModelError, CheckpointError) as error:
        raise type(error)(
            f"{folder} cannot be used with {config.model_name_or_path}: {error}\n{_OTHER_BASE}"
        ) from error


def restore_model(
    model: DocToLora, chat: ChatFormat, config: RunConfig, checkpoint: Checkpoint, source: FoundCheckpoint
) -> TrainedModel:
    """Load a checkpoint's parameters into a new model of its configuration, for inference.

    Raises:
        CheckpointError: they are of another model.
    """
    load_hypernet(model.hypernet, checkpoint.hypernet)
    return TrainedModel(model.to(model.base.device).eval(), chat, config, source)


def _read_config(checkpoint: Checkpoint, folder: Path, model: str | None) -> RunConfig:
    """Read the configuration of a checkpoint, with another base model if one is given."""
    values = dict(checkpoint.state.get("config", {}))
    if model is not None:
        values["model_name_or_path"] = model
    try:
        return saved_config(values)
    except ConfigError as error:
        problems = [f"  {problem}" for problem in error.problems]
        raise CheckpointError("\n".join([f"{folder}: its configuration is of another version:", *problems])) from None


def _require_same_base(folder: Path, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the facts of the base in a checkpoint with the base found, before its weights are loaded."""
    differences = [
        f"  {key}: expected {value!r}, found {found[key]!r}" for key, value in expected.items() if found[key] != value
    ]
    if differences:
        lines = [f"{folder} was trained around another base than {name}:", *differences]
        raise CheckpointError("\n".join([*lines, _OTHER_BASE]))
