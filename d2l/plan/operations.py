"""Floating-point operations of one packed row, counted by part: two for each multiplication with its addition."""

from d2l.base.attention import PER_DOCUMENT
from d2l.hypernet.shape import MLP_RATIO, QUERIES_PER_KEY
from d2l.plan.hypernet_memory import hypernet_memory
from d2l.plan.rows import RowShape
from d2l.plan.sizes import Sizes

_TRAINED = 3  # passes over trained weights: forward, gradients of inputs, gradients of weights


def count_operations(sizes: Sizes, row: RowShape) -> dict[str, int]:
    """Count the operations of a training step's micro-batch by part; the optimizer's are not in it."""
    base, config = sizes.base, sizes.config
    layer = _layer(sizes, row.question_tokens, row.longest_question)
    again = config.gradient_checkpointing
    recomputed = hypernet_memory(sizes, row).recomputed
    return {
        "document pass": encoder_layers(sizes) * _layer(sizes, row.context_tokens, row.longest_document),
        "question pass": base.layers * layer,
        "recomputation": base.layers * layer * again,
        "input gradients": base.layers * _layer_backward(sizes, row.question_tokens, row.longest_question),
        "logits": 2 * 2 * row.label_tokens * base.hidden * base.vocabulary,
        "LoRA": (1 + again + 2) * _lora(sizes, row),
        "modality projection": _projection(sizes, row, again=recomputed),
        "Perceiver": (_TRAINED + recomputed) * _perceiver(sizes, row),
        "heads": _TRAINED * _heads(sizes, row),
    }


def active_weights(sizes: Sizes) -> int:
    """Return the weights of one layer that a token goes through."""
    base = sizes.base
    return base.attention_weights + base.routes * base.expert_weights + base.hidden * base.experts


def encoder_layers(sizes: Sizes) -> int:
    """Return the layers that read documents: the last one's output is no feature."""
    last = {"embed_only": 0, "early_exit": sizes.config.layer_idx}.get(sizes.config.ctx_encoder_type, -1)
    if last == -1:
        return sizes.base.layers - 1
    return sizes.base.layers // 4 if last is None else last


def _layer(sizes: Sizes, tokens: int, longest: int) -> int:
    return 2 * tokens * active_weights(sizes) + _scores(sizes, tokens, longest)


def _layer_backward(sizes: Sizes, tokens: int, longest: int) -> int:
    """Count gradients of inputs: of frozen weights one product, of scores and values two each."""
    return 2 * tokens * active_weights(sizes) + 2 * _scores(sizes, tokens, longest)


def _scores(sizes: Sizes, tokens: int, longest: int) -> int:
    """Count scores and their products with values, of a mean layer; whole squares where attention is eager."""
    base = sizes.base
    seen = {"eager": tokens, PER_DOCUMENT: longest}.get(sizes.load.attention.value, longest / 2)
    if sizes.linear_attention:
        seen += base.windowed * (min(base.window, seen) - seen)
    return int(4 * base.heads * base.head_dim * tokens * seen)


def _lora(sizes: Sizes, row: RowShape) -> int:
    rank = sizes.config.lora_r * (row.chunks_per_context + 1)
    widths = sum(d_in + d_out for d_in, d_out in sizes.shape.modules.values())
    return 2 * row.question_tokens * rank * widths * sizes.shape.n_layers


def _projection(sizes: Sizes, row: RowShape, *, again: bool) -> int:
    """Count the map from features, which have no gradient: the first products of it have two passes, or one again."""
    width, latent = sizes.shape.feature_size, sizes.config.latent_size
    tokens = row.context_tokens * sizes.feature_layers
    if sizes.config.ctx_encoder_type == "concat_layers":
        return (2 + again) * 2 * tokens * width * latent
    inner = MLP_RATIO * width
    return 2 * tokens * ((2 + again) * 2 * width * inner + (_TRAINED + again) * inner * latent)


def _perceiver(sizes: Sizes, row: RowShape) -> int:
    """Count the forward of every cross- and self-attention layer with its SwiGLU."""
    config, shape = sizes.config, sizes.shape
    rows = row.documents * sizes.feature_layers
    latents = rows * config.n_latent_queries
    outputs = rows * len(shape.names) * config.lora_r * (1 if shape.per_layer_features else shape.n_layers)
    cross = _attention_layer(sizes, latents, row.padded_tokens * sizes.feature_layers, row.longest_document)
    self_attention = _attention_layer(sizes, latents, latents, config.n_latent_queries)
    decoder = _attention_layer(sizes, outputs, latents, config.n_latent_queries)
    return config.num_blocks * (cross + config.num_self_attn_per_block * self_attention) + decoder


def _attention_layer(sizes: Sizes, latents: int, keys: int, seen: int) -> int:
    """Count one layer of the Perceiver.

    Args:
        latents, keys: of all rows together; seen: keys that each latent attends to.
    """
    config = sizes.config
    size, queries = config.latent_size, config.perceiver_heads * config.perceiver_head_dim
    weights = 2 * size * queries + 3 * MLP_RATIO * size**2
    return 2 * latents * weights + 2 * keys * 2 * size * (queries // QUERIES_PER_KEY) + 4 * latents * seen * queries


def _heads(sizes: Sizes, row: RowShape) -> int:
    config, shape = sizes.config, sizes.shape
    decoded = row.documents * shape.n_layers * len(shape.names) * config.lora_r
    residual = config.num_pre_head_layers * 2 * MLP_RATIO * config.latent_size**2
    return 2 * decoded * (residual + config.latent_size * shape.row_size)
