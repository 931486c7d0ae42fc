"""The frozen base sharded layer by layer over the processes of a run, by torch's FSDP2 (`fully_shard`).

A process holds its share of every weight, gathers a layer's weights when the layer runs, forward or backward, and frees
them behind it. The first process alone reads the files, on the CPU, and hands the tensors out one by one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedConfig, PreTrainedModel

from d2l.base.experts import compute_experts_eagerly
from d2l.base.layers import decoder_layers
from d2l.base.load import empty_base, load_base
from d2l.base.load_plan import Choice, LoadPlan
from d2l.errors import ModelError

Forward = TypeVar("Forward", bound=Callable[..., Any])


def sharding_obstacle(plan: LoadPlan, processes: int | None = None) -> str:
    """Return why a base that is loaded so cannot be sharded, and what to change; empty where it can.

    Args:
        processes: those of the run; None where they are not known yet.
    """
    if plan.experts.value in ("packed", "native"):
        return (
            f"the experts would be held as {plan.experts.value}, bytes that FSDP2 does not shard: set expert_weights: "
            "dequantize, or base_sharding: none, which holds them whole in a quarter of the memory"
        )
    if plan.quantization.value not in ("none", "mxfp4"):
        return f"weights in {plan.quantization.value} cannot be sharded: set base_sharding: none"
    if processes == 1:
        return (
            "this run has one process: start one for each GPU (torchrun --nproc-per-node N), or set base_sharding: none"
        )
    return ""


def load_sharded_base(
    name_or_path: str, base_config: PreTrainedConfig, plan: LoadPlan, seed: int, *, processes: int
) -> PreTrainedModel:
    """Load the base as `load_base` does, and leave each process of the group its share of every weight.

    Args:
        processes: in the group, which all of them call this in.

    Raises:
        ModelError: it cannot be sharded, or not be loaded; the latter in the first process alone, whose end ends the rest.
    """
    if obstacle := sharding_obstacle(plan, processes):
        raise ModelError(f"base_sharding: full: {obstacle}")
    weights: dict[str, Any] = {}
    if distributed.get_rank() == 0:
        on_cpu = replace(plan, device=Choice("cpu", "the shares are made there"))
        weights = load_base(name_or_path, base_config, on_cpu, seed).state_dict()
    base = empty_base(base_config, plan).requires_grad_(False).eval()
    base.tie_weights()
    device = plan.device.value
    if device == "cpu":
        compute_experts_eagerly(base)
    _shard(base, device, processes)
    _make_room(base, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(base, weights, options=options)
    return base


def _shard(base: PreTrainedModel, device: str, processes: int) -> None:
    """Shard the units; what is left is the root's, which holds it from its forward to the end of the backward."""
    mesh = init_device_mesh(torch.device(device).type, (processes,))
    for unit in (*sharding_units(base), base):
        fully_shard(unit, mesh=mesh)


def sharding_units(base: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that are each gathered and freed as a whole, the layers first.

    Tied, embeddings and head have one weight, which cannot belong to two units: it is the root's.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    return [*decoder_layers(base), *([] if embeddings.weight is head.weight else [embeddings, head])]


def _make_room(base: PreTrainedModel, device: str) -> None:
    """Move parameters from the meta device without values, and buffers with theirs: those in no file were computed."""
    kept = dict(base.named_buffers())
    base.to_empty(device=device)
    for name, buffer in base.named_buffers():
        buffer.copy_(kept[name])


def is_sharded(base: PreTrainedModel) -> bool:
    """Return whether this process holds but a share of the base; all have to run it equally often then."""
    return isinstance(base, FSDPModule)


def as_forward(base: PreTrainedModel, function: Forward) -> Forward:
    """Return a function that runs modules of the base, for a sharded one as a forward pass of it.

    The base's own `forward` is one. Weights outside the layers are there meanwhile, and a layer's are gathered while the
    one before it runs.
    """
    if not is_sharded(base):
        return function
    owner: Any = base
    owner.run_as_forward = function
    register_fsdp_forward_method(base, "run_as_forward")
    registered: Forward = owner.run_as_forward
    return registered
