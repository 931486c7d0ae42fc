"""The frozen base model, loaded as its plan says."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from d2l.base.config import build_model, frozen_config
from d2l.base.experts import (
    compute_experts_eagerly,
    empty_packed_experts,
    group_packed_experts,
    pack_experts,
    round_experts,
)
from d2l.base.files import (
    LOADING_FAILURES,
    first_line,
    has_weights_here,
    is_config_only,
    read_headers,
    read_tensors,
    refuse_incomplete,
    refuse_misfit,
    weights_folder,
)
from d2l.base.load_plan import Choice, LoadPlan
from d2l.errors import ModelError


def random_base(base_config: PreTrainedConfig, plan: LoadPlan, seed: int) -> PreTrainedModel:
    """Build a random model of this config, the same for the same seed, frozen and in eval mode.

    Under `packed`, `dequantize` and `native` the experts are rounded to MXFP4, so that all three compute the same
    function; `native` stands in for kernels that need CUDA: a forward without a backward. What transformers initialises
    to a constant (biases, norms) gets noise, so that leaving it out shows.

    Raises:
        ModelError: transformers cannot build it, for example because it has no such attention implementation.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA's too, which is not restored
        model = build_model(base_config, plan.torch_dtype, plan.attention.value)
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.2 * torch.randn_like(parameter))
    match plan.experts.value:
        case "dequantize":
            round_experts(model)
        case "packed":
            pack_experts(model)
            _group_experts(model, plan)
        case "native":
            for experts in pack_experts(model):
                experts.register_forward_hook(lambda module, inputs, output: output.detach())
    return _frozen(model, plan)


def load_base(name_or_path: str, base_config: PreTrainedConfig, plan: LoadPlan, seed: int) -> PreTrainedModel:
    """Load the base with its weights, frozen and in eval mode; random from `seed` where the source is a config only.

    Raises:
        ModelError: the plan cannot be carried out, or the weights are absent, incomplete or another model's.
    """
    if plan.quantization.value == "bitsandbytes":
        raise ModelError(f"{name_or_path}: {plan.quantization.reason}. Set quantize_ctx_encoder: false.")
    if plan.experts.value == "native":
        raise ModelError(
            f"{name_or_path}: transformers' native MXFP4 experts have no backward; gradients would bypass every MLP "
            f"and be wrong without an error. Set expert_weights: packed or dequantize."
        )
    if is_config_only(name_or_path):
        return random_base(base_config, plan, seed)
    load = _load_packed if plan.experts.value == "packed" else _load_with_transformers
    base = _frozen(load(weights_folder(name_or_path), base_config, plan), plan)
    base.name_or_path = base.config.name_or_path = name_or_path  # not the folder of the cache: adapters name their base
    return base


def empty_base(base_config: PreTrainedConfig, plan: LoadPlan) -> PreTrainedModel:
    """Build the model with dense experts and all parameters on the meta device, without values.

    Raises:
        ModelError: transformers cannot build it.
    """
    with init_empty_weights(include_buffers=False):  # rotary buffers are in no file, so they must be computed
        return build_model(base_config, plan.torch_dtype, plan.attention.value)


def inspect_base(name_or_path: str, base_config: PreTrainedConfig, plan: LoadPlan) -> dict[str, Tensor] | None:
    """Look whether `load_base` would find every tensor of the base, in the kind and shape of its place; reads no values.

    Returns:
        The checkpoint's tensors by their names, on the meta device. `None` where there is nothing to look at: the weights
        are not on this machine, or the base is random by design.

    Raises:
        ModelError: the weights are absent, cut short, incomplete or another model's.
    """
    if is_config_only(name_or_path) or not has_weights_here(name_or_path):
        return None
    folder = weights_folder(name_or_path)
    headers = read_headers(folder)
    on_meta = replace(plan, device=Choice("meta", "no values are read"))
    if plan.quantization.value == "mxfp4":  # dequantized while it is loaded, or not: the files are the same
        model = empty_base(base_config, on_meta)
        empty_packed_experts(model)
        _fill(folder, model, headers.items())
    else:
        _load_with_transformers(folder, base_config, on_meta, headers)
    return headers


def _load_with_transformers(
    folder: Path, base_config: PreTrainedConfig, plan: LoadPlan, headers: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Load a model; of `headers`, where they are given, instead of the folder's tensors."""
    options: dict[str, Any] = {
        "config": frozen_config(base_config),
        "dtype": plan.torch_dtype,
        "attn_implementation": plan.attention.value,
        "device_map": {"": plan.device.value},
        "output_loading_info": True,
    }
    if plan.experts.value == "dequantize":  # explicit: without kernels transformers would do it with a warning
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        if headers is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
        else:
            architecture = type(empty_base(base_config, plan))
            loaded = architecture.from_pretrained(None, state_dict=dict(headers), **options)
    except LOADING_FAILURES as error:
        raise ModelError(f"{folder}: transformers cannot load the base. {first_line(error)}") from error
    model, report = loaded
    refuse_incomplete(folder, report["missing_keys"], [*report["unexpected_keys"], *report["mismatched_keys"]])
    for parameter in model.parameters():  # older releases dequantize to bfloat16 whatever the dtype
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(plan.torch_dtype)
    return model


def _load_packed(folder: Path, base_config: PreTrainedConfig, plan: LoadPlan) -> PreTrainedModel:
    """Put every tensor straight into its place: the peak is the size of the packed model and one tensor."""
    model = empty_base(base_config, plan)
    empty_packed_experts(model)
    _group_experts(model, plan)
    _fill(folder, model, read_tensors(folder, plan.device.value, plan.torch_dtype))
    return model


def _fill(folder: Path, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors into their places in an empty model, and tie what is tied.

    Raises:
        ModelError: one is missing, has no place or does not fit into it.
    """
    places, state = model.state_dict(), {}
    for name, tensor in tensors:
        if name in places:
            refuse_misfit(folder, name, tensor, places[name])
        state[name] = tensor
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    filled = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in state}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and id(embeddings.weight) not in filled:  # they are under the head's name
        embeddings.weight = head.weight
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in filled]
    refuse_incomplete(folder, missing, unexpected)


def _group_experts(model: PreTrainedModel, plan: LoadPlan) -> None:
    """Let packed experts be computed in whole layers where the plan says so."""
    if plan.expert_products.value == "grouped":
        group_packed_experts(model, plan.expert_transient_bytes, plan.torch_dtype)


def _frozen(model: PreTrainedModel, plan: LoadPlan) -> PreTrainedModel:
    """Freeze a model and put it where the plan says, in eval mode."""
    model.requires_grad_(False)
    if plan.device.value == "cpu":
        compute_experts_eagerly(model)
    return model.eval().to(device=plan.device.value)
