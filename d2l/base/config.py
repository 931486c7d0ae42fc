"""The config of a base model: reading it, facts that follow from it, and the model that it describes."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from d2l.base.files import LOADING_FAILURES, first_line
from d2l.base.masks import causal_lm_class
from d2l.errors import ModelError
from d2l.io.hub import from_cache_or_hub
from d2l.io.remote_code import refuse_model_code
from d2l.io.resources import local_or_shipped, resource

GPT_OSS_20B = "openai/gpt-oss-20b"


def read_base_config(name_or_path: str) -> PreTrainedConfig:
    """Read the config of a local folder, a config file or a hub id; openai/gpt-oss-20b needs no network.

    Raises:
        ModelError: there is none, transformers does not know its model type, or it brings code of its own.
    """
    source = local_or_shipped(name_or_path)
    try:
        if name_or_path == GPT_OSS_20B:
            try:
                return _read_config(GPT_OSS_20B, local_files_only=True)
            except OSError:  # not in the cache: the same facts are shipped
                return _read_config(resource("configs/models/gpt_oss_20b.json"))
        if source is not None:
            return _read_config(source)
        return from_cache_or_hub(lambda local: _read_config(name_or_path, local_files_only=local), name_or_path)
    except LOADING_FAILURES as error:
        raise ModelError(
            f"no config of a base model in {name_or_path!r}: expected a folder with config.json, a config file, or a "
            f"hub id that is cached or can be reached. {first_line(error)}"
        ) from error


def _read_config(name_or_path: str | Path, local_files_only: bool = False) -> PreTrainedConfig:
    """Read a config by transformers, after a look for code that it would need."""
    refuse_model_code(name_or_path, local_files_only)
    return AutoConfig.from_pretrained(name_or_path, local_files_only=local_files_only, trust_remote_code=False)


def quantization_method(base_config: PreTrainedConfig) -> str | None:
    """Return the method in a checkpoint's quantization_config (mxfp4, fp8, gptq, ...), None without one."""
    settings = getattr(base_config, "quantization_config", None)
    if settings is None:
        return None
    method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def head_size(base_config: PreTrainedConfig) -> int:
    """Return the size of an attention head."""
    own: int | None = getattr(base_config, "head_dim", None)
    return own or base_config.hidden_size // base_config.num_attention_heads


def skeleton(base_config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device: every name and shape, no memory; experts unpacked."""
    with torch.device("meta"):
        return build_model(base_config, torch.float32)


def build_model(base_config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Build an initialised model without quantization: its experts are dense, or about to become ours."""
    causal_lm_class(base_config)  # raises where there is none
    config = frozen_config(base_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    except LOADING_FAILURES as error:
        raise ModelError(
            f"transformers cannot build {config.model_type} with attn_implementation: {attention}. {first_line(error)}"
        ) from error


def frozen_config(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a config without a cache, and without dropout: checkpointing needs training mode, which would enable it."""
    config = deepcopy(base_config)
    config.use_cache = False
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config
