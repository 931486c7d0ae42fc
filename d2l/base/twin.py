"""A tiny config of the same kind as a model's: its faults are the same, and cost milliseconds to find."""

from itertools import count
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from d2l.errors import ModelError

HIDDEN = 64  # like the intermediate size a multiple of 32, MXFP4's block
INTERMEDIATE = 96  # nor is its double the hidden size: any transposed projection shows
HEAD_DIM = 16
VOCABULARY = 128
WINDOW = 4  # shorter than any probe
LAYERS = 4
_POSITIONS = 64  # of the original rope, so that its scaling acts within a probe's length
_LARGEST_GROUP = 8  # query heads to a key-value head

TWIN_CANNOT_SHOW = (
    "running out of memory: a twin is a few megabytes",
    "overflow and rounding in bfloat16 at the real width and depth",
    "CUDA kernels: attention, Triton and fused kernels that only run on a GPU",
    "damage to the real weights, such as a transposed or truncated tensor",
    "what the real model knows: losses of a random model say nothing about quality",
)


def twin_config(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink width, depth, experts, vocabulary and window; keep everything that decides which code runs.

    Kept: model type, order of the layer types (at least one of each), ratio of query to key-value heads, top-k of the
    routing, sinks, biases, norms, kind of rope, tied embeddings, quantization.

    Raises:
        ModelError: transformers refuses the smaller config.
    """
    try:
        return type(base_config).from_dict(_shrunk(base_config))
    except (KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"no twin can be made of model_type {base_config.model_type}: {error}") from error


def _shrunk(base_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of the twin's config."""
    values = base_config.to_dict()
    layers = _depth(base_config)
    heads, key_value_heads, head_dim = _heads(base_config)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": INTERMEDIATE,
        "ffn_hidden_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "rotary_dim": head_dim,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "initializer_range": 1.6 / HIDDEN**0.5,  # activations, attention patterns and logits of order one
    }
    for name, size in (sizes | _experts(base_config)).items():
        own_name = base_config.attribute_map.get(name, name)
        if values.get(own_name) is not None:
            values[own_name] = size
    for name, value in values.items():  # one entry for each layer: layer_types and the like
        if isinstance(value, list) and len(value) == base_config.num_hidden_layers:
            values[name] = value[:layers]
    values |= _positions(values, head_dim) | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return values


def _depth(base_config: PreTrainedConfig) -> int:
    """Count the layers of the shortest beginning with every layer type in it, at least four where there are so many."""
    layer_types = getattr(base_config, "layer_types", None) or [None] * base_config.num_hidden_layers
    complete = next(depth for depth in count(1) if set(layer_types[:depth]) == set(layer_types))
    return min(max(LAYERS, complete), base_config.num_hidden_layers)


def _heads(base_config: PreTrainedConfig) -> tuple[int, int, int]:
    """Choose query heads, key-value heads and head size; keep the ratio, and whether heads add up to the hidden size."""
    heads = base_config.num_attention_heads
    key_value_heads = getattr(base_config, "num_key_value_heads", None) or heads
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    kept = min(2, key_value_heads)  # two where there are several, so that mixing them up shows
    kept_heads = min(heads // key_value_heads, _LARGEST_GROUP) * kept
    if getattr(base_config, "qk_rope_head_dim", None):  # multi-head latent attention has head sizes of its own
        return kept_heads, kept, head_dim
    return kept_heads, kept, HIDDEN // kept_heads if heads * head_dim == base_config.hidden_size else HEAD_DIM


def _experts(base_config: PreTrainedConfig) -> dict[str, int]:
    """Keep twice as many experts as a token takes, so that routing has a choice."""
    top_k = getattr(base_config, "num_experts_per_tok", None)
    if top_k is None:
        return {}
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return {name: min(2 * top_k, getattr(base_config, name)) for name in names if getattr(base_config, name, None)}


def _positions(values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Reduce the positions, and the rope in proportion."""
    positions = values.get("max_position_embeddings")
    rope = values.get("rope_parameters")
    if positions is None:
        return {}
    original = (rope or {}).get("original_max_position_embeddings")
    fewer = positions * _POSITIONS // original if original else 32 * _POSITIONS
    shrunk: dict[str, Any] = {"max_position_embeddings": fewer}
    if "original_max_position_embeddings" in values:
        shrunk["original_max_position_embeddings"] = _POSITIONS
    if rope is not None:
        shrunk["rope_parameters"] = _shrink_rope(rope, head_dim)
    return shrunk


def _shrink_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Make the same kind of rope over few positions and a small head; nested where layer types have their own."""
    shrunk: dict[str, Any] = {
        name: _shrink_rope(value, head_dim) if isinstance(value, dict) else value for name, value in rope.items()
    }
    if shrunk.get("original_max_position_embeddings"):
        shrunk["original_max_position_embeddings"] = _POSITIONS
    for name in ("short_factor", "long_factor"):  # longrope: one factor for each pair of rotated dimensions
        if name in shrunk:
            pairs = int(head_dim * shrunk.get("partial_rotary_factor", 1.0)) // 2
            shrunk[name] = shrunk[name][:pairs]
    return shrunk
