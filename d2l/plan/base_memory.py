"""Bytes of the frozen base: its weights, and what its layers keep and work with in the passes of a step."""

from d2l.base.attention import PER_DOCUMENT
from d2l.base.mxfp4 import BITS_PER_WEIGHT
from d2l.plan.sizes import Sizes

_FLOAT32 = 4
# Bytes a weight while transformers dequantizes, measured on a CPU: result, transpose, indices, casts. CUDA takes fewer.
_LOADING_DEQUANTIZED = 10
# Copies of a layer's scores that are alive at once: with sinks, shifted and softmax; in backward softmax and gradients.
_SCORES_AT_WORK = 3
_LINEAR = "flex"  # in the name of an attention whose memory is linear: it takes grouped heads and masks by blocks


def weight_bytes(sizes: Sizes) -> tuple[int, int]:
    """Return the bytes of the frozen weights, and those that loading the largest tensor takes for a moment."""
    weights, size = sizes.weights, sizes.element
    if _packed(sizes) or sizes.load.experts.value == "native":
        packed = int(weights.experts * BITS_PER_WEIGHT / 8)
        held = packed + (weights.total - weights.experts) * size
        return held, max(weights.largest_tensor * size, int(weights.largest_expert_tensor * BITS_PER_WEIGHT / 8))
    dequantized = sizes.load.experts.value == "dequantize"
    transient = _LOADING_DEQUANTIZED * weights.largest_expert_tensor if dequantized else 0
    return weights.total * size, max(transient, weights.largest_tensor * size)


def scores_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes of one layer's attention scores over a row; none where they are never whole.

    Args:
        tokens: of the row; longest: of one document or question in it.
    """
    seen = {"eager": tokens, PER_DOCUMENT: longest}.get(sizes.load.attention.value, 0)
    return sizes.base.heads * tokens * seen * sizes.element


def mask_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes of a row's masks: whole ones for each kind of layer, in the base's dtype or bool."""
    whole = sizes.base.layer_kinds * tokens**2
    return {"eager": whole * sizes.element, "sdpa": whole, PER_DOCUMENT: longest**2 * sizes.element}.get(
        sizes.load.attention.value, 0
    )


def expert_transient(sizes: Sizes, experts_at_once: int) -> int:
    """Return the bytes of packed experts that are dequantized at once, both projections of each."""
    return experts_at_once * sizes.base.expert_weights * sizes.element if _packed(sizes) else 0


def layer_forward_bytes(sizes: Sizes, tokens: int, longest: int, experts_at_once: int) -> int:
    """Return the bytes at work in one layer without gradients: attention, or the experts behind it."""
    base, size = sizes.base, sizes.element
    share = min(1.0, experts_at_once / base.experts) if base.experts else 1.0  # of the routes that are computed at once
    routed = int(tokens * base.routes * share) * (8 * base.intermediate + 2 * base.hidden)
    attention = tokens * 2 * base.head_dim * (base.heads + base.key_heads) * size
    experts = (routed + 2 * tokens * base.hidden) * size + expert_transient(sizes, experts_at_once)
    scores = _SCORES_AT_WORK * scores_bytes(sizes, tokens, longest)
    return 2 * tokens * base.hidden * size + max(attention + scores, experts)


def layer_kept_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes that one layer keeps for its backward."""
    return _attention_kept(sizes, tokens, longest) + _mlp_kept(sizes, tokens)


def layer_backward_bytes(sizes: Sizes, tokens: int, longest: int, experts_at_once: int) -> int:
    """Return the bytes of one layer in its backward: what it keeps and the gradients at work.

    The experts' backward comes first; what they kept is free when that of the scores begins.
    """
    base, size = sizes.base, sizes.element
    share = min(1.0, experts_at_once / base.experts) if base.experts else 1.0
    routed = int(tokens * base.routes * share) * (4 * base.intermediate + base.hidden) * size
    experts = _mlp_kept(sizes, tokens) + routed + expert_transient(sizes, experts_at_once)
    scores = (_SCORES_AT_WORK - 1) * scores_bytes(sizes, tokens, longest)
    return 3 * tokens * base.hidden * size + _attention_kept(sizes, tokens, longest) + max(experts, scores)


def _attention_kept(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return what attention and the norms keep: queries, keys and values, the output, and the softmax of scores."""
    base = sizes.base
    repeated = (
        0 if _LINEAR in sizes.load.attention.value else 2 * base.heads
    )  # keys and values, for heads that share them
    values = (2 * base.heads + 2 * base.key_heads + repeated) * base.head_dim
    return tokens * (4 * base.hidden + values) * sizes.element + scores_bytes(sizes, tokens, longest)


def _mlp_kept(sizes: Sizes, tokens: int) -> int:
    """Return what a dense MLP or the experts keep: for a route gate and up, the SwiGLU's values and the output."""
    base = sizes.base
    values = base.routes * (6 * base.intermediate + base.hidden) if base.experts else 4 * base.intermediate
    return tokens * values * sizes.element


def logits_bytes(sizes: Sizes, label_tokens: int) -> int:
    """Return the bytes of the logits at labels: themselves, in float32, and their softmax or its gradient."""
    narrow = sizes.element if sizes.element < _FLOAT32 else 0
    return label_tokens * sizes.base.vocabulary * (narrow + 2 * _FLOAT32 + (0 if narrow else _FLOAT32))


def _packed(sizes: Sizes) -> bool:
    return sizes.load.experts.value == "packed"
