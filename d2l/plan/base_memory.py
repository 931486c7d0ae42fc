"""Bytes of the frozen base: its weights, and what its layers keep and work with in the passes of a step."""

from d2l.base.attention import PER_DOCUMENT
from d2l.base.mxfp4 import BITS_PER_WEIGHT
from d2l.plan.expert_memory import mlp_backward_bytes, mlp_forward_bytes, mlp_kept_bytes
from d2l.plan.sizes import Sizes
from d2l.train.losses import slice_bytes

_FLOAT32 = 4
# Bytes a weight while transformers dequantizes, measured on a CPU: result, transpose, indices, casts. CUDA takes fewer.
_LOADING_DEQUANTIZED = 10
# Copies of a layer's scores that are alive at once: with sinks, shifted and softmax; in backward softmax and gradients.
_SCORES_AT_WORK = 3
# Units (layers, embeddings) of a sharded base that are whole at once: the one that runs, the one that is gathered ahead,
# and the message that carried it. Measured on a CPU, two processes, 12 layers of 16 MiB: 3.2.
_GATHERED_UNITS = 3
_SLICES_AT_WORK = 3  # of logits: themselves, their softmax and its gradient


def weight_bytes(sizes: Sizes) -> tuple[int, int]:
    """Return the bytes of the frozen weights, and those that loading the largest tensor takes for a moment.

    Of a sharded base they are a process's share; tensors come from the first process's CPU, one by one.
    """
    weights, size = sizes.weights, sizes.element
    if sizes.shares > 1:
        largest = max(weights.largest_tensor, weights.largest_expert_tensor)
        return -(-weights.total * size // sizes.shares), largest * size
    if _packed(sizes) or sizes.load.experts.value == "native":
        packed = int(weights.experts * BITS_PER_WEIGHT / 8)
        held = packed + (weights.total - weights.experts) * size
        return held, max(weights.largest_tensor * size, int(weights.largest_expert_tensor * BITS_PER_WEIGHT / 8))
    dequantized = sizes.load.experts.value == "dequantize"
    transient = _LOADING_DEQUANTIZED * weights.largest_expert_tensor if dequantized else 0
    return weights.total * size, max(transient, weights.largest_tensor * size)


def gathered_bytes(sizes: Sizes) -> int:
    """Return the bytes of the weights that a sharded base holds whole while it runs; 0 for one that is not sharded."""
    whole = _GATHERED_UNITS * sizes.weights.largest_unit + sizes.weights.rest
    return whole * sizes.element if sizes.shares > 1 else 0


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


def layer_forward_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes at work in one layer without gradients: attention, or the MLP behind it."""
    base, size = sizes.base, sizes.element
    attention = tokens * 2 * base.head_dim * (base.heads + base.key_heads) * size
    scores = _SCORES_AT_WORK * scores_bytes(sizes, tokens, longest)
    return 2 * tokens * base.hidden * size + max(attention + scores, mlp_forward_bytes(sizes, tokens))


def layer_kept_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes that one layer keeps for its backward."""
    return _attention_kept(sizes, tokens, longest) + mlp_kept_bytes(sizes, tokens)


def layer_backward_bytes(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return the bytes of one layer in its backward: what it keeps and the gradients at work.

    The experts' backward comes first; what they kept is free when that of the scores begins.
    """
    mlp = mlp_kept_bytes(sizes, tokens) + mlp_backward_bytes(sizes, tokens)
    scores = (_SCORES_AT_WORK - 1) * scores_bytes(sizes, tokens, longest)
    residual = 3 * tokens * sizes.base.hidden * sizes.element
    return residual + _attention_kept(sizes, tokens, longest) + max(mlp, scores)


def _attention_kept(sizes: Sizes, tokens: int, longest: int) -> int:
    """Return what attention and the norms keep: queries, keys and values, the output, and the softmax of scores."""
    base = sizes.base
    repeated = 0 if sizes.linear_attention else 2 * base.heads  # keys and values, for heads that share them
    values = (2 * base.heads + 2 * base.key_heads + repeated) * base.head_dim
    sums = base.heads * _FLOAT32 if sizes.linear_attention else 0  # log-sum-exp
    return tokens * ((4 * base.hidden + values) * sizes.element + sums) + scores_bytes(sizes, tokens, longest)


def logits_bytes(sizes: Sizes, label_tokens: int) -> int:
    """Return the bytes of the logits at labels and their gradient, and of three slices of them in float32 at work."""
    values = label_tokens * sizes.base.vocabulary
    slices = _SLICES_AT_WORK * min(values * _FLOAT32, slice_bytes("cuda" if sizes.on_gpu else "cpu"))
    return 2 * values * sizes.element + slices


def _packed(sizes: Sizes) -> bool:
    return sizes.load.experts.value == "packed"
