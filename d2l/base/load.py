"""The frozen base model: every choice of how to load it, with its reason, and the loading itself."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

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
    is_config_only,
    read_tensors,
    refuse_incomplete,
    refuse_misfit,
    weights_folder,
)
from d2l.base.flex import PACKED_FLEX, kernel_obstacle
from d2l.base.masks import causal_lm_class
from d2l.config.schema import RunConfig
from d2l.errors import ModelError
from d2l.io.hub import from_cache_or_hub
from d2l.io.resources import local_or_shipped, resource

GPT_OSS_20B = "openai/gpt-oss-20b"
# Compute capabilities, major, where torch 2.11 to 2.13 multiply all experts in one kernel; on others it copies the
# offsets to the host and loops. Source: aten/src/ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`.
_ONE_KERNEL_A_LAYER = (9, 10)


@dataclass(frozen=True)
class Choice:
    """A choice and its reason."""

    value: str
    reason: str


@dataclass(frozen=True)
class LoadPlan:
    """Plan of how the base will be loaded. It states facts and refuses nothing; the checks judge it.

    attention: an `attn_implementation` of transformers, `per_document` or `packed_flex`.
    experts: packed (MXFP4, our backward to the inputs), dequantize, native (transformers' kernels, no backward), dense.
    quantization: none, mxfp4, bitsandbytes, or the checkpoint's own method.
    dtype: float32 or bfloat16.
    device: as torch names it.
    expert_products: of packed experts: grouped (a whole layer at once) or one_by_one.
    expert_transient_bytes: most bytes of dequantized weights at a time, where packed experts are grouped.
    """

    attention: Choice
    experts: Choice
    quantization: Choice
    dtype: Choice
    device: Choice
    expert_products: Choice
    expert_transient_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.value)


def read_base_config(name_or_path: str) -> PreTrainedConfig:
    """Read the config of a local folder, a config file or a hub id; openai/gpt-oss-20b needs no network.

    Raises:
        ModelError: there is none, or transformers does not know its model type.
    """
    source = local_or_shipped(name_or_path)
    try:
        if name_or_path == GPT_OSS_20B:
            try:
                return AutoConfig.from_pretrained(GPT_OSS_20B, local_files_only=True)
            except OSError:  # not in the cache: the same facts are shipped
                return AutoConfig.from_pretrained(resource("configs/models/gpt_oss_20b.json"))
        if source is not None:
            return AutoConfig.from_pretrained(source)
        return from_cache_or_hub(
            lambda local: AutoConfig.from_pretrained(name_or_path, local_files_only=local), name_or_path
        )
    except LOADING_FAILURES as error:
        raise ModelError(
            f"no config of a base model in {name_or_path!r}: expected a folder with config.json, a config file, or a "
            f"hub id that is cached or can be reached. {first_line(error)}"
        ) from error


def plan_load(
    config: RunConfig,
    base_config: PreTrainedConfig,
    device: str | None = None,
    capability: tuple[int, int] | None = None,
) -> LoadPlan:
    """Decide how to load the base.

    Args:
        device: as torch names it; by default CUDA where there is one, else the CPU.
        capability: compute capability (major, minor) of a CUDA device that is not here; by default that of the one here.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _plan_dtype(config.dtype, where, capability)
    return LoadPlan(
        attention=_plan_attention(config.attn_implementation, base_config, where, capability),
        experts=_plan_experts(config.expert_weights, base_config),
        quantization=_plan_quantization(config.quantize_ctx_encoder, base_config),
        dtype=dtype,
        device=Choice(where, "named by the caller" if device else "CUDA where there is a device, else the CPU"),
        expert_products=_plan_expert_products(where, dtype.value, capability),
        expert_transient_bytes=int(config.expert_transient_gib * 2**30),
    )


def _plan_attention(
    requested: str, base_config: PreTrainedConfig, device: str, capability: tuple[int, int] | None
) -> Choice:
    on_cuda = device.startswith("cuda")
    if requested != "auto":
        computed = "" if on_cuda or requested != PACKED_FLEX else f"; on {device} by its formula, with all scores"
        return Choice(requested, f"attn_implementation: {requested}{computed}")
    if any(name.endswith(".sinks") for name, _ in skeleton(base_config).named_parameters()):
        need = "the attention has sinks, which SDPA ignores and no released flash kernel has a backward for"
    elif causal_lm_class(base_config)._supports_sdpa:
        return Choice("sdpa", f"{base_config.model_type} supports it, and it takes masks for packed documents")
    else:
        need = f"{base_config.model_type} does not support SDPA"
    obstacle = (
        kernel_obstacle(head_size(base_config), capability) if on_cuda else f"on {device} it would fill all scores too"
    )
    if obstacle:
        return Choice("eager", f"{need}; not {PACKED_FLEX}: {obstacle}")
    return Choice(PACKED_FLEX, f"{need}; on CUDA flex_attention computes it in memory linear in the length")


def head_size(base_config: PreTrainedConfig) -> int:
    """Return the size of an attention head."""
    own: int | None = getattr(base_config, "head_dim", None)
    return own or base_config.hidden_size // base_config.num_attention_heads


def _plan_experts(requested: str, base_config: PreTrainedConfig) -> Choice:
    if quantization_method(base_config) != "mxfp4":
        unused = "" if requested == "auto" else f", so expert_weights: {requested} has no effect"
        return Choice("dense", f"the checkpoint holds no MXFP4{unused}")
    match requested:
        case "dequantize":
            return Choice(
                requested, "expert_weights: dequantize; whole experts in memory, four times their MXFP4 bytes in bf16"
            )
        case "native":
            return Choice(requested, "expert_weights: native; transformers' own MXFP4 kernels, which have no backward")
        case _:
            return Choice("packed", "the checkpoint is MXFP4, and frozen experts need gradients to their inputs only")


def _plan_expert_products(device: str, dtype: str, capability: tuple[int, int] | None) -> Choice:
    if not device.startswith("cuda"):
        return Choice("one_by_one", f"on {device} one expert at a time stays in the caches, and nothing waits")
    if dtype != "bfloat16":
        return Choice("one_by_one", f"grouped products are one kernel in bfloat16 only, and dtype is {dtype}")
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major in _ONE_KERNEL_A_LAYER:
        return Choice("grouped", f"CUDA SM {major}{minor} multiplies all experts of a layer in one kernel")
    return Choice(
        "one_by_one",
        f"CUDA SM {major}{minor} has no kernel for all experts of a layer at once (SM 90 and 100 have): the host loops over "
        f"them, several times slower",
    )


def _plan_quantization(quantize_ctx_encoder: bool, base_config: PreTrainedConfig) -> Choice:
    method = quantization_method(base_config)
    if quantize_ctx_encoder and method:
        return Choice(
            "bitsandbytes",
            f"quantize_ctx_encoder: true asks for bitsandbytes on top of {method}, which ends in a ValueError at load "
            f"('The model is quantized with ... but you are passing a BitsAndBytesConfig')",
        )
    if quantize_ctx_encoder:
        return Choice(
            "bitsandbytes", "quantize_ctx_encoder: true, but the encoder is the base itself, not a second copy"
        )
    return Choice(method or "none", "the checkpoint's quantization_config" if method else "the checkpoint has none")


def _plan_dtype(requested: str, device: str, capability: tuple[int, int] | None) -> Choice:
    if requested != "auto":
        return Choice(requested, f"dtype: {requested}")
    if not device.startswith("cuda"):
        return Choice("float32", f"on {device} bfloat16 is less exact and hardly faster")
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major < 8:
        return Choice("float32", f"CUDA SM {major}{minor} does not compute in bfloat16; SM 80 and later do")
    return Choice("bfloat16", f"CUDA SM {major}{minor} computes in bfloat16")


def quantization_method(base_config: PreTrainedConfig) -> str | None:
    """Return the method in a checkpoint's quantization_config (mxfp4, fp8, gptq, ...), None without one."""
    settings = getattr(base_config, "quantization_config", None)
    if settings is None:
        return None
    method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def skeleton(base_config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: every name and shape, no memory; experts unpacked."""
    with torch.device("meta"):
        return _from_config(base_config, torch.float32)


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
        model = _from_config(base_config, plan.torch_dtype, plan.attention.value)
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


def _frozen_config(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a config without a cache, and without dropout: checkpointing needs training mode, which would enable it."""
    config = deepcopy(base_config)
    config.use_cache = False
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def _from_config(base_config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Build an initialised model without quantization: its experts are dense, or about to become ours."""
    causal_lm_class(base_config)  # raises where there is none
    config = _frozen_config(base_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except LOADING_FAILURES as error:
        raise ModelError(
            f"transformers cannot build {config.model_type} with attn_implementation: {attention}. {first_line(error)}"
        ) from error


def _load_with_transformers(folder: Path, base_config: PreTrainedConfig, plan: LoadPlan) -> PreTrainedModel:
    config = _frozen_config(base_config)
    options: dict[str, Any] = {}
    if plan.experts.value == "dequantize":  # explicit: without kernels transformers would do it with a warning
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=plan.torch_dtype,
            attn_implementation=plan.attention.value,
            device_map={"": plan.device.value},
            output_loading_info=True,
            **options,
        )
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
    with init_empty_weights(include_buffers=False):  # rotary buffers are in no file, so they must be computed
        model = _from_config(base_config, plan.torch_dtype, plan.attention.value)
    empty_packed_experts(model)
    _group_experts(model, plan)
    unexpected, places = [], model.state_dict()
    for name, tensor in read_tensors(folder, plan.device.value, plan.torch_dtype):
        if name in places:
            refuse_misfit(folder, name, tensor, places[name])
        unexpected += model.load_state_dict({name: tensor}, strict=False, assign=True).unexpected_keys
    if model.get_input_embeddings().weight.is_meta:  # tied, and the file holds the pair under the other name
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
    model.tie_weights()
    refuse_incomplete(folder, [name for name, tensor in model.state_dict().items() if tensor.is_meta], unexpected)
    return model


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
