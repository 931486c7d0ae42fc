"""Bytes that the hypernetwork keeps for its backward, counted from what each operation of it saves.

On a GPU beside a bfloat16 base its products are in bfloat16 under autocast, which saves a narrow copy of each input; norms
are in float32. A fused norm (CUDA) saves its input, a composite one (CPU) also the normed values.

Shape legend, as in `d2l.hypernet.perceiver`: F = feature size, D = latent size; a row is what the Perceiver reads at once:
a chunk, of every layer by itself where features are per layer.
"""

from dataclasses import dataclass

from d2l.hypernet.perceiver import MLP_RATIO, QUERIES_PER_KEY
from d2l.plan.rows import RowShape
from d2l.plan.sizes import Sizes

_FLOAT32 = 4


@dataclass(frozen=True)
class HypernetMemory:
    """Bytes of a micro-batch in the hypernetwork.

    Attributes:
        features: of the documents in float32, alive during its forward.
        projection: kept by the map from features to latents.
        perceiver: kept by cross-attention, by tokens and by latents.
        heads: kept by the residual MLPs and the head that writes the LoRA.
        casts: weights in bfloat16, kept for backward.
        passing_casts: those in bfloat16 that the end of the forward frees.
        lora: the merged LoRAs, in float32.
    """

    features: int
    projection: int
    perceiver: int
    heads: int
    casts: int
    passing_casts: int
    lora: int

    @property
    def kept(self) -> int:
        """Bytes from the hypernetwork's forward until its backward, the LoRAs aside."""
        return self.projection + self.perceiver + self.heads + self.casts


def hypernet_memory(sizes: Sizes, row: RowShape) -> HypernetMemory:
    """Count the bytes of one packed row."""
    shape, config = sizes.shape, sizes.config
    rows = row.documents * sizes.feature_layers
    outputs = len(shape.names) * config.lora_r * (1 if shape.per_layer_features else shape.n_layers)
    cross = config.num_blocks * rows * config.n_latent_queries
    selves = cross * config.num_self_attn_per_block
    tokens = row.padded_tokens * sizes.feature_layers
    decoded = rows * outputs
    latents = (cross + selves + decoded) * _latent_bytes(sizes) + selves * _key_bytes(sizes, own_norm=False)
    context = (config.num_blocks * tokens + rows * config.n_latent_queries) * _key_bytes(sizes, own_norm=True)
    projected = tokens * config.latent_size * _compute(sizes)
    casts, passing = _cast_bytes(sizes)
    return HypernetMemory(
        features=row.context_tokens * sizes.feature_layers * shape.feature_size * _FLOAT32,
        projection=row.context_tokens * sizes.feature_layers * _projection_bytes(sizes),
        perceiver=latents + context + projected,
        heads=decoded * _head_bytes(sizes),
        casts=casts,
        passing_casts=passing,
        lora=lora_bytes(sizes, row),
    )


def lora_bytes(sizes: Sizes, row: RowShape) -> int:
    """Count the merged LoRAs of a row's contexts: rank r for each chunk and for the learned bias."""
    rank = sizes.config.lora_r * (row.chunks_per_context + 1)
    widths = sum(d_in + d_out for d_in, d_out in sizes.shape.modules.values())
    return row.contexts * sizes.shape.n_layers * rank * widths * _FLOAT32


def projection_backward_bytes(sizes: Sizes, row: RowShape) -> int:
    """Count the gradients that are alive at once in the backward of the map from features to latents."""
    inner = 0 if _is_linear(sizes) else 3 * MLP_RATIO * sizes.shape.feature_size
    return row.context_tokens * sizes.feature_layers * (inner + sizes.config.latent_size) * _compute(sizes)


def _compute(sizes: Sizes) -> int:
    """Return the bytes of a number in the hypernetwork's products."""
    return 2 if sizes.mixed else _FLOAT32


def _is_linear(sizes: Sizes) -> bool:
    return sizes.config.ctx_encoder_type == "concat_layers"


def _projection_bytes(sizes: Sizes) -> int:
    """Count, for a token: the SwiGLU keeps gate, up, silu(gate) and their product, and its input once for each product."""
    width = sizes.shape.feature_size
    if _is_linear(sizes):
        return width * _compute(sizes)
    inputs = 2 * width if sizes.mixed else width
    return (4 * MLP_RATIO * width + inputs) * _compute(sizes)


def _norm_bytes(sizes: Sizes) -> int:
    """Count, for a normed vector of the latent size."""
    return sizes.config.latent_size * _FLOAT32 * (1 if sizes.on_gpu else 2)


def _latent_bytes(sizes: Sizes) -> int:
    """Count, for a latent in one layer: four norms; query, attention and its copy for o_proj; the SwiGLU's four values."""
    config, compute = sizes.config, _compute(sizes)
    queries = config.perceiver_heads * config.perceiver_head_dim
    inputs = (3 if sizes.mixed else 2) * config.latent_size  # of q_proj, and of gate and up
    wide = 3 * queries + 4 * MLP_RATIO * config.latent_size
    return 4 * _norm_bytes(sizes) + (wide + inputs) * compute + config.perceiver_heads * _FLOAT32


def _key_bytes(sizes: Sizes, *, own_norm: bool) -> int:
    """Count, for a token that is attended to in one layer: a norm, the inputs of k_proj and v_proj, key and value."""
    config, compute = sizes.config, _compute(sizes)
    keys = config.perceiver_heads // QUERIES_PER_KEY * config.perceiver_head_dim
    if own_norm:
        # unmixed, the input is one tensor for all blocks: only what is normed is a layer's own
        norm = _norm_bytes(sizes) if sizes.mixed else config.latent_size * _FLOAT32
        inputs = (2 if sizes.mixed else 1) * config.latent_size
    else:
        norm, inputs = 0, (2 if sizes.mixed else 0) * config.latent_size
    return norm + (inputs + 2 * keys) * compute


def _head_bytes(sizes: Sizes) -> int:
    """Count, for a latent of the decoder: residual MLPs, the normalised latent, and the row of A and B."""
    config, compute = sizes.config, _compute(sizes)
    residual = 2 * (1 + MLP_RATIO) * config.latent_size * compute + 2 * config.latent_size * _FLOAT32
    return config.num_pre_head_layers * residual + (sizes.shape.row_size + 2 * config.latent_size) * compute


def _cast_bytes(sizes: Sizes) -> tuple[int, int]:
    """Count weights in bfloat16: those kept, and those of products whose input has no gradient."""
    if not sizes.mixed:
        return 0, 0
    first = sizes.projection if _is_linear(sizes) else sizes.projection - _down_weights(sizes)
    return 2 * (sizes.trained - first), 2 * first


def _down_weights(sizes: Sizes) -> int:
    return MLP_RATIO * sizes.shape.feature_size * sizes.config.latent_size
