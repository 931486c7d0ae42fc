"""Every choice of how to load a base model, with its reason."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from d2l.base.config import head_size, quantization_method, skeleton
from d2l.base.flex import PACKED_FLEX, kernel_obstacle
from d2l.base.grouped import ONE_KERNEL_FOR_ALL
from d2l.base.masks import causal_lm_class
from d2l.config.schema import RunConfig


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
    elif getattr(base_config, "attn_logit_softcapping", None):  # releases such as 5.13 say that Gemma 2 supports SDPA
        need = "its scores are capped (attn_logit_softcapping), which SDPA ignores"
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
    if major in ONE_KERNEL_FOR_ALL:
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
