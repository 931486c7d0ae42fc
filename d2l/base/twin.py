"""A tiny config of the same kind as a model's: its faults are the same, and cost milliseconds to find."""

from collections.abc import Callable
from itertools import count
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from d2l.errors import ModelError

HIDDEN = 64  # or near it, as transformers demands a multiple of the number of heads
INTERMEDIATE = (96, 128)  # the first that is not the hidden size, nor is its double: any transposed projection shows
HEAD_DIMS = (16, 32)  # tried first, where the heads do not add up to the hidden size
VOCABULARY = 128
WINDOW = 4  # shorter than any probe
KERNEL_WINDOW = 128  # of the attention twin: one block of a kernel, and what GPT-OSS has
LAYERS = 4
_POSITIONS = 64  # of the original rope, so that its scaling acts within a probe's length
_LARGEST_GROUP = 8  # query heads to a key-value head
_BLOCK = 32  # of MXFP4: a multiple of it is every input of an expert

_Widths = Callable[[PreTrainedConfig, int], tuple[int, int]]

TWIN_CANNOT_SHOW = (
    "running out of memory: a twin is a few megabytes",
    "overflow and rounding in bfloat16 at the real width and depth",
    "CUDA kernels: attention (ATT401 judges it on a GPU), Triton and fused kernels that only run on a GPU",
    "what takes more than two experts a token: a twin's checks route to two of four",
    "damage to the real weights, such as a transposed or truncated tensor",
    "what the real model knows: losses of a random model say nothing about quality",
)


def twin_config(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink width, depth, experts, vocabulary and window; keep everything that decides which code runs.

    Kept: model type, order of the layer types (at least one of each), ratio of query to key-value heads (up to 8), whether
    the heads add up to the hidden size, top-k of the routing, sinks, biases, norms, kind of rope, tied embeddings,
    quantization.

    Raises:
        ModelError: transformers refuses the smaller config.
    """
    return _made(base_config, lambda: _shrunk(base_config, _widths))


def attention_twin_config(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink all but the size of a head, and the window to 128 tokens at most: kernels are made for these sizes.

    Every expert is taken by every token: a difference in rounding cannot grow by changing a route.

    Raises:
        ModelError: transformers refuses the smaller config.
    """

    def shrunk() -> dict[str, Any]:
        values = _shrunk(base_config, _real_widths)
        for name, size in _experts(base_config).items():
            values[base_config.attribute_map.get(name, name)] = min(size, base_config.num_experts_per_tok)
        if values.get("sliding_window") is not None:
            values["sliding_window"] = min(base_config.sliding_window, KERNEL_WINDOW)
        return values

    return _made(base_config, shrunk)


def _made(base_config: PreTrainedConfig, shrink: Callable[[], dict[str, Any]]) -> PreTrainedConfig:
    try:
        return type(base_config).from_dict(shrink())
    except (KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"no twin can be made of model_type {base_config.model_type}: {error}") from error


def _shrunk(base_config: PreTrainedConfig, widths: _Widths) -> dict[str, Any]:
    """Return the fields of the twin's config; `widths` chooses hidden size and head size for a number of heads."""
    values = base_config.to_dict()
    layers = _depth(base_config)
    heads, key_value_heads = _heads(base_config)
    hidden, head_dim = widths(base_config, heads)
    intermediate = next(size for size in INTERMEDIATE if hidden not in (size, 2 * size))
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate,
        "shared_expert_intermediate_size": intermediate,
        "ffn_hidden_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "rotary_dim": head_dim,
        "q_lora_rank": hidden // 2,  # of multi-head latent attention, whose heads keep their sizes
        "kv_lora_rank": hidden // 4,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "initializer_range": 1.6 / hidden**0.5,  # activations, attention patterns and logits of order one
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


def _heads(base_config: PreTrainedConfig) -> tuple[int, int]:
    """Choose the numbers of query and key-value heads, in their ratio.

    Raises:
        ValueError: the real model has no ratio; a twin would hide that its attention cannot run.
    """
    heads = base_config.num_attention_heads
    key_value_heads = getattr(base_config, "num_key_value_heads", None) or heads
    if heads % key_value_heads:
        raise ValueError(f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({key_value_heads})")
    kept = min(2, key_value_heads)  # two where there are several, so that mixing them up shows
    return min(heads // key_value_heads, _LARGEST_GROUP) * kept, kept


def _widths(base_config: PreTrainedConfig, heads: int) -> tuple[int, int]:
    """Choose the hidden size and the head size for so many query heads; the heads add up to it where the model's do."""
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
    if getattr(base_config, "qk_rope_head_dim", None):  # multi-head latent attention has head sizes of its own
        return HIDDEN, head_dim
    block = _BLOCK if getattr(base_config, "quantization_config", None) else 1
    shares = [size for size in range(4, 257, 4) if heads * size % block == 0 and _rotates(base_config, size)]
    share = min(shares, key=lambda size: abs(heads * size - HIDDEN))
    if (
        getattr(base_config, "head_dim", None) is None
        or base_config.num_attention_heads * head_dim == base_config.hidden_size
    ):
        return heads * share, share
    sizes = (*HEAD_DIMS, *range(4, 257, 4))
    return heads * share, next(size for size in sizes if size != share and _rotates(base_config, size))


def _real_widths(base_config: PreTrainedConfig, heads: int) -> tuple[int, int]:
    """Choose the hidden size, and keep the real head size; the heads add up to the former where the model's do."""
    hidden, _ = _widths(base_config, heads)
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
    adds_up = base_config.num_attention_heads * head_dim == base_config.hidden_size
    return heads * head_dim if adds_up else hidden, head_dim


def _rotates(base_config: PreTrainedConfig, head_dim: int) -> bool:
    """Return whether rope turns pairs of a head of this size, where it turns a part of every head only."""
    rope = getattr(base_config, "rope_parameters", None) or {}
    kinds = [values for values in rope.values() if isinstance(values, dict)] or [rope]
    rotated = [int(head_dim * values.get("partial_rotary_factor", 1.0)) for values in kinds]
    return all(size > 0 and size % 2 == 0 for size in rotated)


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
