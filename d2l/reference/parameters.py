"""Parameters in a file of the reference: names and shapes as d2l's model has them, compared before a tensor is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d2l.data.records import listing
from d2l.errors import CheckpointError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape
from d2l.reference.fields import short
from d2l.reference.inert_pickle import TensorReference

COMPILED = "_orig_mod"  # torch.compile wraps a module; the wrapper's name for it becomes part of each parameter's


def without_compiled_names(state: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """Remove `_orig_mod.` from names, wherever a compiled module left it and however often.

    Returns:
        The state dict under plain names, and a note if a name changed.

    Raises:
        CheckpointError: two names are the same without it, so that which is meant cannot be told.
    """
    plain: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        new = ".".join(part for part in name.split(".") if part != COMPILED)
        if new in plain:
            raise CheckpointError(
                f"{file}: {short(origin[new])} and {short(name)} are one name without the {COMPILED}. of compiled models; "
                f"expected one of them, and which is meant cannot be told: save the file again with the right one"
            )
        plain[new], origin[new] = value, name
    changed = sum(new != name for new, name in origin.items())
    note = f"{COMPILED}. of a compiled model removed from {changed} of {len(plain)} names"
    return plain, [note] if changed else []


def without_unused_biases(
    parameters: Mapping[str, TensorReference], shape: HypernetShape
) -> tuple[dict[str, TensorReference], list[str]]:
    """Leave out the biases of a model with `use_bias: false`: the reference saves them all the same and ignores them.

    Returns:
        The parameters that the model has, and a note if some were left out. Biases of other modules or shapes stay.
    """
    if shape.config.use_bias:
        return dict(parameters), []
    rows = (shape.n_layers, shape.config.lora_r)
    unused = {
        f"bias_{side}.{name}": (*rows, size)
        for name, sizes in shape.modules.items()
        for side, size in zip("AB", sizes, strict=True)
    }
    left_out = sorted(name for name, size in unused.items() if name in parameters and parameters[name].size == size)
    kept = {name: value for name, value in parameters.items() if name not in left_out}
    note = f"use_bias is false: {', '.join(left_out)} are in the file and not used, as in the reference"
    return kept, [note] if left_out else []


def require_parameters(parameters: Mapping[str, TensorReference], shape: HypernetShape, file: Path) -> None:
    """Compare names and shapes with those of a hypernetwork of this shape, on the meta device.

    Raises:
        CheckpointError: a parameter is missing, left over or of another shape; the message names the first of each.
    """
    config = shape.config
    if max(config.num_blocks, config.num_self_attn_per_block, config.num_pre_head_layers) > len(parameters):
        raise CheckpointError(
            f"{file}: its arguments describe more layers than it has tensors (num_blocks {config.num_blocks}, "
            f"num_self_attn_per_block {config.num_self_attn_per_block}, num_pre_head_layers {config.num_pre_head_layers}; "
            f"{len(parameters)} tensors); it is damaged or was changed: fetch it again"
        )
    try:
        with torch.device("meta"):
            own = {name: tuple(value.shape) for name, value in Hypernetwork(shape).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: its arguments describe no model: {error!s:.200}") from error
    missing, unexpected = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
    other = sorted(name for name in own.keys() & parameters.keys() if parameters[name].size != own[name])
    if not missing and not unexpected and not other:
        return
    problems = [f"{name}: expected {list(own[name])}, found none" for name in missing]
    problems += [f"{short(name)}: expected none, found {_shape_of(parameters[name])}" for name in unexpected]
    problems += [f"{name}: expected {list(own[name])}, found {_shape_of(parameters[name])}" for name in other]
    raise CheckpointError(
        f"{file} is of another model than its arguments describe: {len(missing)} parameters missing, {len(unexpected)} "
        f"left over, {len(other)} of another shape:\n{listing(problems)}\n"
        "it is damaged, or of a version or fork that has other parameters: import the file that the reference's trainer wrote"
    )


def _shape_of(parameter: TensorReference) -> str:
    """Format the shape that a file gives a parameter, which may be anything."""
    size = parameter.size
    return short(list(size) if isinstance(size, tuple) else size)
