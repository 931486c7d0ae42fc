"""Bytes that the hypernetwork keeps for its backward pass and works with, and the pieces that bound those of its Perceiver.

Shape legend: L = layers of features, n = chunks, T = their tokens, P = those padded to the longest chunk, F = feature
size, D = latent size, Q = query heads · head size, K = key heads · head size, q = latents of a chunk.
Parameters, gradients and the residual stream of the latents are in float32; c = bytes of a value that a product makes: 2
under bfloat16 autocast, else 4. A norm saves its input and what is normed; fused, as on CUDA, its input alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from d2l.base.segments import Segments
from d2l.hypernet.shape import MLP_RATIO, QUERIES_PER_KEY, HypernetShape

# What the Perceiver may keep of one piece for its backward pass: 3% of a card of 80 GB. A piece of that size has about
# 10^12 operations, milliseconds beside which its launches and its part of the gradients (0.5 GB, published) are little.
PIECE_BYTES = 2**31
_FLOAT32 = 4
# Of the bytes that the modality projection keeps: its forward makes gate, silu(gate) and up, then up goes for the product;
# its backward frees the product, and works with three gradients beside the three that are left.
_PROJECTION_FORWARD, _PROJECTION_BACKWARD = 3 / 4, 6 / 4


@dataclass(frozen=True)
class Piece:
    """Chunks under consecutive layers' features, read by the Perceiver in one go."""

    chunks: tuple[int, ...]
    layers: range


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one packed row of documents in the hypernetwork.

    Attributes:
        features: of the context encoder, in the base's dtype, without padding; alive until the backward pass is over.
        perceiver: kept by the Perceiver for its backward pass, copies of features and weights included.
        heads: kept from the Perceiver's latents to the LoRA of every chunk.
        passing: copies of weights that end with the forward.
        forward: at work in the forward of the Perceiver where that is recomputed.
        backward: at work at the end of the Perceiver's backward, beside the sum of each parameter's gradients: with
            `perceiver` where it is recomputed, else instead of it.
        recomputed: whether the Perceiver's pieces are computed again in its backward.
    """

    features: int
    perceiver: int
    heads: int
    passing: int
    forward: int
    backward: int
    recomputed: bool

    @property
    def kept(self) -> int:
        """Bytes from the forward to the backward, the features and the LoRAs aside."""
        return self.perceiver + self.heads


def activation_bytes(
    shape: HypernetShape,
    chunk_lengths: Sequence[int],
    *,
    feature_bytes: int,
    compute_bytes: int,
    fused_norms: bool = False,
) -> ActivationBytes:
    """Compute the bytes of a packed row of documents: features L·T·F, and those of the Perceiver as follows.

    * Where the `total_bytes` of the Perceiver fit into `PIECE_BYTES`, they are kept. The end of its backward works with
      6/4 of the largest projection.
    * Else the pieces of `cut` are recomputed one by one: kept are the decoded latents. At work is the largest piece, or at
      its end 6/4 of its projection and the piece's own gradients of the other parameters.
    * Groups of chunks, where there is more than one, have a copy of their features.

    Under autocast there is a copy of the weights besides; of those whose inputs have no gradient, during the forward only.

    To either come the heads: for each of the L·n·M·r rows, and each residual MLP, D·(2·4 + 9·c); once D·(4 + c) and the
    row of A and B; under autocast a copy of their weights. The LoRAs, merged and bound, are not among them.

    Args:
        chunk_lengths: tokens of each chunk.
        feature_bytes: of a value of the features, which have the base's dtype.
        compute_bytes: c.
    """
    chunks, layers = Segments(tuple(chunk_lengths)), shape.feature_layers
    groups = cut(shape, chunks, compute_bytes)
    pieces = [_size(piece, chunks) for group in groups for piece in group]
    kept = [perceiver_bytes(shape, *size, compute_bytes, fused_norms=fused_norms) for size in pieces]
    projection = max(_projection_bytes(shape, size[0], size[2], compute_bytes) for size in pieces)
    features = layers * chunks.n_tokens * shape.feature_size * feature_bytes
    copies = features if len(groups) > 1 else 0
    recomputed = total_bytes(shape, groups, chunks, compute_bytes) > PIECE_BYTES
    first = _first_parameters(shape)
    others = perceiver_parameters(shape) - first
    weights, passing = ((n * compute_bytes if compute_bytes < _FLOAT32 else 0) for n in (others, first))
    forward, at_end = (int(part * projection) for part in (_PROJECTION_FORWARD, _PROJECTION_BACKWARD))
    if recomputed:
        perceiver = layers * len(chunks) * shape.outputs * shape.config.latent_size * _FLOAT32
        copy = copies // len(groups)
        backward = weights + copy + max(*kept, at_end + others * _FLOAT32)
        forward, passing = forward + copy, weights + passing
    else:
        perceiver, backward = sum(kept) + copies + weights, at_end + copies + weights
    return ActivationBytes(
        features=features,
        perceiver=perceiver,
        heads=_head_bytes(shape, len(chunks), compute_bytes),
        passing=passing,
        forward=forward,
        backward=backward,
        recomputed=recomputed,
    )


def cut(shape: HypernetShape, chunks: Segments, compute_bytes: int) -> list[list[Piece]]:
    """Cut chunks and layers into pieces of at most `PIECE_BYTES` each, where one chunk under one layer does not exceed it.

    Returns:
        For every group of chunks the pieces of its layers, in order; together the groups hold every chunk once.
    """
    groups = []
    for similar in chunks.of_similar_length():
        width, layers = max(chunks.lengths[i] for i in similar), shape.feature_layers
        of_chunk = perceiver_bytes(shape, layers, 1, width, width, compute_bytes)
        parts = min(len(similar), ceil(len(similar) / max(1, PIECE_BYTES // of_chunk)))
        stretches = min(layers, ceil(of_chunk / PIECE_BYTES))
        for part in range(parts):
            members = similar[part * len(similar) // parts : (part + 1) * len(similar) // parts]
            borders = [stretch * layers // stretches for stretch in range(stretches + 1)]
            groups.append([Piece(members, range(*ends)) for ends in pairwise(borders)])
    return groups


def perceiver_bytes(
    shape: HypernetShape,
    layers: int,
    chunks: int,
    tokens: int,
    padded: int,
    compute_bytes: int,
    *,
    fused_norms: bool = False,
) -> int:
    """Compute what the Perceiver keeps for its backward pass, of chunks of so many tokens in all, and so many padded (P).

    * Projection: gate, up, silu(gate) and their product, L·T·4·4F·c. `concat_layers`: nothing.
    * Each cross-attention: its context, normed and as the input of two products L·P·2·4·D, keys and values L·P·2·K·c, and
      under autocast a copy in float32, L·P·4·D, where otherwise all share the one context.
    * Each layer, for each of its latents: inputs of four norms, and normed, in float32 8·4·D; inputs of products 4·D and
      c·D; queries, and the attention's output in two orders, 3·Q·c; the SwiGLU's 16·D·c; a log-sum-exp for each head.
      Self-attention has keys and values of its latents besides.
    * Fused norms: 4·D less for each.
    """
    config, autocast = shape.config, compute_bytes < _FLOAT32
    size, heads = config.latent_size, config.perceiver_heads
    keys, queries = (n * config.perceiver_head_dim * compute_bytes for n in (2 * heads // QUERIES_PER_KEY, heads))
    value = _FLOAT32 * size
    normed = 0 if fused_norms else value
    per_key = value + normed + keys
    per_latent = 5 * value + 4 * normed + (1 + 4 * MLP_RATIO) * size * compute_bytes + 3 * queries + _FLOAT32 * heads
    context, latents, outputs = (layers * n for n in (padded, chunks * config.n_latent_queries, chunks * shape.outputs))
    blocks, own = config.num_blocks, config.num_blocks * config.num_self_attn_per_block
    encoder = blocks * (context * per_key + latents * per_latent) + own * latents * (per_latent + keys)
    decoder = latents * (per_key + value) + outputs * per_latent
    norms = (value + normed) * (latents + outputs)
    copies = value * (blocks * context + own * latents) if autocast else value * context
    return _projection_bytes(shape, layers, tokens, compute_bytes) + encoder + decoder + norms + copies


def total_bytes(shape: HypernetShape, groups: Sequence[Sequence[Piece]], chunks: Segments, compute_bytes: int) -> int:
    """Compute what the Perceiver keeps for its backward pass where no piece is recomputed; under autocast its weights too."""
    pieces = sum(_piece_bytes(shape, piece, chunks, compute_bytes) for group in groups for piece in group)
    return pieces + _copied_weights(shape, compute_bytes)


def perceiver_parameters(shape: HypernetShape) -> int:
    """Count the Perceiver's parameters."""
    config = shape.config
    size, inner, width = config.latent_size, MLP_RATIO * config.latent_size, config.perceiver_head_dim
    heads = config.perceiver_heads
    layer = 2 * size * width * (heads + heads // QUERIES_PER_KEY) + 3 * size * inner + 4 * size
    blocks = 1 if config.shared_weights else config.num_blocks
    own = blocks * config.num_self_attn_per_block
    cross = (2 if config.shared_weights and config.num_blocks > 1 else blocks) + 1  # the last one is the decoder's
    features = shape.feature_size
    projection = features * size
    if config.ctx_encoder_type != "concat_layers":
        projection = MLP_RATIO * features * (2 * features + size)
    latents = config.n_latent_queries + shape.outputs
    return projection + (cross + own) * layer + cross * size + latents * size + 2 * size


def _projection_bytes(shape: HypernetShape, layers: int, tokens: int, compute_bytes: int) -> int:
    if shape.config.ctx_encoder_type == "concat_layers":
        return 0
    return layers * tokens * 4 * MLP_RATIO * shape.feature_size * compute_bytes


def _first_parameters(shape: HypernetShape) -> int:
    """Count the weights whose inputs are the features, which have no gradient: no product with them is in the backward."""
    if shape.config.ctx_encoder_type == "concat_layers":
        return shape.feature_size * shape.config.latent_size
    return 2 * MLP_RATIO * shape.feature_size**2


def _copied_weights(shape: HypernetShape, compute_bytes: int) -> int:
    return compute_bytes * perceiver_parameters(shape) if compute_bytes < _FLOAT32 else 0


def _head_bytes(shape: HypernetShape, chunks: int, compute_bytes: int) -> int:
    config, size = shape.config, shape.config.latent_size
    modules = shape.n_layers * len(shape.modules)
    rows = chunks * modules * config.lora_r
    values = rows * (size * (_FLOAT32 + compute_bytes) + shape.row_size * compute_bytes)
    values += rows * size * config.num_pre_head_layers * (2 * _FLOAT32 + (1 + 2 * MLP_RATIO) * compute_bytes)
    if compute_bytes >= _FLOAT32:
        return values
    maps = config.num_pre_head_layers * (shape.n_layers if config.per_layer_processing else 1)
    return values + compute_bytes * (maps * 2 * MLP_RATIO * size**2 + modules * size * shape.row_size)


def _piece_bytes(shape: HypernetShape, piece: Piece, chunks: Segments, compute_bytes: int) -> int:
    return perceiver_bytes(shape, *_size(piece, chunks), compute_bytes)


def _size(piece: Piece, chunks: Segments) -> tuple[int, int, int, int]:
    """Return the layers of a piece, its chunks, their tokens, and those when padded to the longest."""
    lengths = [chunks.lengths[i] for i in piece.chunks]
    return len(piece.layers), len(lengths), sum(lengths), len(lengths) * max(lengths)
