"""The Perceiver, features of chunks → one latent for every LoRA row, with grouped-query cross-attention.

Shape legend: n = chunks, L = layers of the base, M = target modules, r = rank, T = packed tokens,
S = tokens of a padded row, F = feature size, D = latent size.
Parameter names are those of the reference implementation (SakanaAI/doc-to-lora): its checkpoints load as they are.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from d2l.base.segments import Segments
from d2l.errors import ModelError
from d2l.hypernet.recompute import in_pieces
from d2l.hypernet.shape import MLP_RATIO, QUERIES_PER_KEY, HypernetShape

NORM_EPS = 1e-6

# cuDNN, which torch prefers on SM 90, builds a plan for every new shape and keeps it, and packed rows always bring new
# ones: 0.4 s forward and 0.5 s backward for each, measured with torch 2.11 (modelscope/FunASR#3704). Flash and
# memory-efficient attention build nothing.
torch.backends.cuda.enable_cudnn_sdp(False)


class RMSNorm(nn.RMSNorm):
    """Computes in the dtype of its weight; under autocast its input may be narrower, and fused kernels take one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) · up(x))` without biases."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_in, MLP_RATIO * d_in, bias=False)
        self.up_proj = nn.Linear(d_in, MLP_RATIO * d_in, bias=False)
        self.down_proj = nn.Linear(MLP_RATIO * d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention, not causal and without positions."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        latent_size, head_size = shape.config.latent_size, shape.config.perceiver_head_dim
        self.key_heads = shape.config.perceiver_heads // QUERIES_PER_KEY
        queries, keys = shape.config.perceiver_heads * head_size, self.key_heads * head_size
        self.q_proj = nn.Linear(latent_size, queries, bias=False)
        self.k_proj = nn.Linear(latent_size, keys, bias=False)
        self.v_proj = nn.Linear(latent_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, latent_size, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from latents [b, q, D] to a context [b, s, D] under a mask of keys, bool [b, s] → [b, q, D].

        Query heads that share a key head are stacked as more queries of it, so that keys are never repeated: exact,
        because only keys are masked.
        """
        h = self.key_heads
        query = rearrange(self.q_proj(latents), "b q (h g d) -> b h (g q) d", h=h, g=QUERIES_PER_KEY)
        key = rearrange(self.k_proj(context), "b s (h d) -> b h s d", h=h)
        value = rearrange(self.v_proj(context), "b s (h d) -> b h s d", h=h)
        key_mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        return self.o_proj(rearrange(mixed, "b h (g q) d -> b q (h g d)", g=QUERIES_PER_KEY))


class Layer(nn.Module):
    """Cross-attention to a context, or self-attention among the latents; then a SwiGLU. Norms before and after each."""

    def __init__(self, shape: HypernetShape, *, cross: bool) -> None:
        super().__init__()
        latent_size = shape.config.latent_size
        self.input_latents_layernorm = RMSNorm(latent_size, NORM_EPS)
        self.input_context_layernorm = RMSNorm(latent_size, NORM_EPS) if cross else None
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(latent_size, NORM_EPS)
        self.pre_ff_layernorm = RMSNorm(latent_size, NORM_EPS)
        self.post_ff_layernorm = RMSNorm(latent_size, NORM_EPS)
        self.mlp = SwiGLU(latent_size, latent_size)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.input_latents_layernorm(latents)
        if self.input_context_layernorm is None:
            attended = self.self_attn(normed, normed, None)
        else:
            attended = self.self_attn(normed, self.input_context_layernorm(context), mask)
        latents = latents + self.post_attention_layernorm(attended)
        return latents + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(latents)))


class Resampler(nn.Module):
    """Learned latents that read a context through a stack of layers."""

    def __init__(self, shape: HypernetShape, n_latents: int, layers: list[Layer]) -> None:
        super().__init__()
        latent_size = shape.config.latent_size
        self.latents_q = nn.Parameter(torch.randn(n_latents, latent_size))
        self.layers = nn.ModuleList(layers)
        self.layernorm = RMSNorm(latent_size, NORM_EPS)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read a context [b, s, D] under a mask of keys, bool [b, s], into latents [b, n_latents, D]."""
        latents = repeat(self.latents_q, "q d -> b q d", b=context.shape[0])
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.layernorm(latents)


class Perceiver(nn.Module):
    """Resamples each chunk to a few latents, then decodes one latent for every layer, module and rank.

    The keys of the configuration that it and its parts read:

    * `n_latent_queries`: latents of the encoder, a chunk's bottleneck.
    * `num_blocks`: blocks of one cross-attention layer and `num_self_attn_per_block` self-attention layers.
    * `shared_weights`: all blocks share their layers, except that block 0 has a cross-attention of its own.
    * `per_rank_gen`: a latent for every rank; otherwise one for a whole module, and the output lacks the rank axis.
    * `perceiver_heads`: query heads of every attention, `perceiver_head_dim` wide; each four share a key head.
    * `perceiver_query_scale`: factor on the initial query weights. At 1, as published, every latent starts as nearly
      the same mean over all tokens; at 10 latents read different tokens from the first step on.
    * `ctx_encoder_type`: with per-layer features, layer l's latents come from layer l's features alone; otherwise all
      come from one set. Layers side by side come to the latent size by one Linear instead of the published SwiGLU,
      whose inner width of 4·F would be most of the parameters.
    """

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        config = shape.config
        self.shape = shape
        self.rank = config.lora_r if config.per_rank_gen else None
        layers = _blocks(shape)
        self.perceiver = nn.ModuleDict(
            {
                "modality_projection": _modality_projection(shape),
                "encoder": Resampler(shape, config.n_latent_queries, layers),
                "decoder": Resampler(shape, shape.outputs, [Layer(shape, cross=True)]),
            }
        )
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Attention):
                    module.q_proj.weight.mul_(config.perceiver_query_scale)

    def forward(self, features: Tensor, chunks: Segments) -> Tensor:
        """Make the latents of every chunk; chunks never see each other.

        Args:
            features: [1, L, T, F] where every layer has features of its own, else [1, T, F].
            chunks: their tokens in `features`.

        Returns:
            [n, L, M, r, D], or [n, L, M, D] when not `per_rank_gen`.

        Raises:
            ModelError: per-layer features do not have L layers.
            ValueError: the chunks do not cover the features exactly.
        """
        if not self.shape.per_layer_features:
            features = features[:, None]
        elif features.shape[1] != self.shape.n_layers:
            raise ModelError(
                f"the context encoder gave features of {features.shape[1]} layers, but the base has "
                f"{self.shape.n_layers} to adapt; use an encoder with as many layers, or `ctx_encoder_type: early_exit` "
                "(one set for all layers)"
            )
        if (features.shape[0], features.shape[2]) != (1, chunks.n_tokens):
            raise ValueError(
                f"chunks of {chunks.lengths} tokens need features of one row with {chunks.n_tokens} tokens, not of "
                f"{features.shape[0]} with {features.shape[2]}"
            )
        decoded = in_pieces(self.read, features[0], chunks, self.shape, tuple(self.parameters()))
        axes = {"m": len(self.shape.names)}  # lf: layers of the features; lq: of the latents
        if self.rank is None:
            return rearrange(decoded, "lf n (lq m) d -> n (lf lq) m d", **axes)
        return rearrange(decoded, "lf n (lq m r) d -> n (lf lq) m r d", r=self.rank, **axes)

    def read(self, features: Tensor, chunks: Segments) -> Tensor:
        """Read chunks under each layer's features [l, T, F] by itself into decoded latents [l, n, outputs, D]."""
        if not torch.is_autocast_enabled(features.device.type):  # which casts them by itself, and without a copy more
            features = features.to(next(self.parameters()).dtype)
        context, mask = chunks.pad(self.perceiver["modality_projection"](features))
        n_layers = len(context)
        keys = None if mask is None else repeat(mask, "n s -> (l n) s", l=n_layers)
        latents = self.perceiver["encoder"](rearrange(context, "l n s d -> (l n) s d"), keys)
        return rearrange(self.perceiver["decoder"](latents), "(l n) q d -> l n q d", l=n_layers)


def _modality_projection(shape: HypernetShape) -> nn.Module:
    """Make the map from features to the latent size."""
    if shape.config.ctx_encoder_type == "concat_layers":
        return nn.Linear(shape.feature_size, shape.config.latent_size, bias=False)
    return SwiGLU(shape.feature_size, shape.config.latent_size)


def _blocks(shape: HypernetShape) -> list[Layer]:
    """Make the encoder's layers, block after block; a shared layer occurs several times."""

    def block() -> list[Layer]:
        own = range(shape.config.num_self_attn_per_block)
        return [Layer(shape, cross=True), *(Layer(shape, cross=False) for _ in own)]

    first, others = block(), shape.config.num_blocks - 1
    if shape.config.shared_weights:
        return first + [Layer(shape, cross=True), *first[1:]] * others
    return first + [layer for _ in range(others) for layer in block()]
