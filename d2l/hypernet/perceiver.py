"""Features of document chunks → one latent for every LoRA row: a Perceiver with grouped-query cross-attention.

Shape legend: n = chunks, L = layers of the base, M = target modules, r = rank, T = packed tokens,
S = tokens of a padded row, F = feature size, D = latent size.
Parameter names are those of the reference implementation (SakanaAI/doc-to-lora): its checkpoints load as they are.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from d2l.errors import ModelError

QUERIES_PER_KEY = 4
MLP_RATIO = 4
NORM_EPS = 1e-6


@dataclass(frozen=True)
class AttentionHeads:
    """Of the Perceiver's attentions.

    Attributes:
        count: query heads, a multiple of 4; each four share a key and a value head.
        size: of every head.
    """

    count: int
    size: int

    @property
    def keys(self) -> int:
        """Key and value heads."""
        return self.count // QUERIES_PER_KEY


PUBLISHED_HEADS = AttentionHeads(count=16, size=128)


@dataclass(frozen=True)
class Segments:
    """Where the chunks of documents lie in a batch of features.

    Attributes:
        lengths: tokens of each chunk; 0 is allowed.
        width: tokens of a right-padded row (one row per chunk), or None: all chunks one after another in a single row.
    """

    lengths: tuple[int, ...]
    width: int | None = None

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Self:
        """Packed chunks from `position_ids` [1, T] that restart at 0 for every chunk."""
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], position_ids.shape[1]]
        return cls(tuple(end - start for start, end in zip(starts, ends, strict=True)))

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> Self:
        """Right-padded chunks from `attention_mask` [n, S], 1 on tokens and 0 on the padding after them.

        Raises:
            ValueError: a row is padded on the left or has a gap.
        """
        if (attention_mask.int().diff(dim=1) > 0).any():
            raise ValueError("attention_mask must be right-padded: ones, then zeros, in every row")
        return cls(tuple(attention_mask.sum(1).tolist()), width=attention_mask.shape[1])

    def pack(self, x: Tensor) -> Tensor:
        """[n, L, S, F] padded or [1, L, T, F] packed → [L, T, F]: the tokens of all chunks without padding."""
        expected = (1, sum(self.lengths)) if self.width is None else (len(self.lengths), self.width)
        if (x.shape[0], x.shape[2]) != expected:
            raise ValueError(
                f"features for {self} must have (rows, tokens) = {expected}, not {(x.shape[0], x.shape[2])}"
            )
        if self.width is None:
            return x[0]
        return rearrange(x, "n l s f -> l (n s) f").index_select(1, self._cells(self.width).to(x.device))

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[L, T, D] packed → ([L, n, S, D] with zeros after each chunk, key mask [n, S] bool); S is the longest chunk.

        A chunk of no tokens keeps its zeros as keys: a softmax over nothing would be NaN.
        """
        n, width = len(self.lengths), max(1, *self.lengths)
        cells = self._cells(width).to(x.device)
        grid = x.new_zeros(x.shape[0], n * width, x.shape[2]).index_copy(1, cells, x)
        mask = self._occupied(width) | (torch.tensor(self.lengths) == 0)[:, None]
        return rearrange(grid, "l (n s) d -> l n s d", n=n), mask.to(x.device)

    def _occupied(self, width: int) -> Tensor:
        return torch.arange(width) < torch.tensor(self.lengths)[:, None]

    def _cells(self, width: int) -> Tensor:
        """int64 [T]: the place of each token in a flattened grid of rows of `width`."""
        return self._occupied(width).flatten().nonzero().flatten()


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

    def __init__(self, latent_size: int, heads: AttentionHeads) -> None:
        super().__init__()
        self.heads = heads
        queries, keys = heads.count * heads.size, heads.keys * heads.size
        self.q_proj = nn.Linear(latent_size, queries, bias=False)
        self.k_proj = nn.Linear(latent_size, keys, bias=False)
        self.v_proj = nn.Linear(latent_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, latent_size, bias=False)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """latents [b, q, D], context [b, s, D], mask [b, s] bool on keys → [b, q, D].

        Query heads that share a key head are stacked as more queries of it, so that keys are never repeated: exact,
        because only keys are masked.
        """
        query = rearrange(self.q_proj(latents), "b q (h g d) -> b h (g q) d", h=self.heads.keys, g=QUERIES_PER_KEY)
        key = rearrange(self.k_proj(context), "b s (h d) -> b h s d", h=self.heads.keys)
        value = rearrange(self.v_proj(context), "b s (h d) -> b h s d", h=self.heads.keys)
        key_mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        return self.o_proj(rearrange(mixed, "b h (g q) d -> b q (h g d)", g=QUERIES_PER_KEY))


class Layer(nn.Module):
    """Cross-attention to a context, or self-attention among the latents; then a SwiGLU. Norms before and after each."""

    def __init__(self, latent_size: int, heads: AttentionHeads, *, cross: bool) -> None:
        super().__init__()
        self.input_latents_layernorm = RMSNorm(latent_size, NORM_EPS)
        self.input_context_layernorm = RMSNorm(latent_size, NORM_EPS) if cross else None
        self.self_attn = Attention(latent_size, heads)
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

    def __init__(self, n_latents: int, latent_size: int, layers: list[Layer]) -> None:
        super().__init__()
        self.latents_q = nn.Parameter(torch.randn(n_latents, latent_size))
        self.layers = nn.ModuleList(layers)
        self.layernorm = RMSNorm(latent_size, NORM_EPS)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """context [b, s, D], mask [b, s] → [b, n_latents, D]."""
        latents = repeat(self.latents_q, "q d -> b q d", b=context.shape[0])
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.layernorm(latents)


class Perceiver(nn.Module):
    """Resamples each chunk to a few latents, then decodes one latent for every layer, module and rank.

    Args:
        feature_size: F, the hidden size of the context encoder.
        latent_size: D.
        n_layers: L; n_modules: M; rank: r.
        heads: of every attention.
        n_latent_queries: latents of the encoder, a chunk's bottleneck.
        num_blocks: blocks of one cross-attention layer and `num_self_attn_per_block` self-attention layers.
        shared_weights: all blocks share their layers, except that block 0 has a cross-attention of its own.
        per_rank_gen: a latent for every rank; otherwise one for a whole module, and the output lacks the rank axis.
        per_layer_features: layer l's latents come from layer l's features alone; otherwise all come from one set.
        linear_projection: features come to the latent size by one Linear instead of the published SwiGLU, whose inner
            width of 4·F is most of the parameters where F is the layers side by side.
        query_scale: factor on the initial query weights. At 1, as published, every latent starts as nearly the same mean over
            all tokens; at 10 latents read different tokens from the first step on.
    """

    def __init__(
        self,
        *,
        feature_size: int,
        latent_size: int,
        n_layers: int,
        n_modules: int,
        rank: int,
        heads: AttentionHeads = PUBLISHED_HEADS,
        n_latent_queries: int,
        num_blocks: int,
        num_self_attn_per_block: int,
        shared_weights: bool,
        per_rank_gen: bool,
        per_layer_features: bool,
        linear_projection: bool = False,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_layers, self.n_modules, self.per_layer_features = n_layers, n_modules, per_layer_features
        self.rank = rank if per_rank_gen else None
        n_outputs = n_modules * (self.rank or 1) * (1 if per_layer_features else n_layers)
        layers = _blocks(latent_size, heads, num_blocks, num_self_attn_per_block, shared_weights)
        projection = (
            nn.Linear(feature_size, latent_size, bias=False) if linear_projection else SwiGLU(feature_size, latent_size)
        )
        self.perceiver = nn.ModuleDict(
            {
                "modality_projection": projection,
                "encoder": Resampler(n_latent_queries, latent_size, layers),
                "decoder": Resampler(n_outputs, latent_size, [Layer(latent_size, heads, cross=True)]),
            }
        )

        attentions = (module for module in self.modules() if isinstance(module, Attention))
        with torch.no_grad():
            for attention in attentions:
                attention.q_proj.weight.mul_(query_scale)

    def forward(self, features: Tensor, segments: Segments) -> Tensor:
        """Latents of every chunk; chunks never see each other.

        Args:
            features: layer-to-layer [b, L, T, F], else [b, T, F]; b = 1 when packed, else one right-padded row per
                chunk. Padding is never read.
            segments: where the chunks lie in `features`.

        Returns:
            [n, L, M, r, D], or [n, L, M, D] when not `per_rank_gen`.

        Raises:
            ModelError: layer-to-layer features do not have L layers.
        """
        if not self.per_layer_features:
            features = features[:, None]
        elif features.shape[1] != self.n_layers:
            raise ModelError(
                f"the context encoder gave features of {features.shape[1]} layers, but the base has {self.n_layers} to "
                "adapt; use an encoder with as many layers, or `ctx_encoder_type: early_exit` (one set for all layers)"
            )
        tokens = segments.pack(features).to(next(self.parameters()).dtype)
        context, mask = segments.pad(self.perceiver["modality_projection"](tokens))
        latents = self.perceiver["encoder"](
            rearrange(context, "l n s d -> (l n) s d"), repeat(mask, "n s -> (l n) s", l=context.shape[0])
        )
        decoded = self.perceiver["decoder"](latents)
        axes = {"n": len(segments.lengths), "m": self.n_modules}  # lf: layers of the features; lq: of the latents
        if self.rank is None:
            return rearrange(decoded, "(lf n) (lq m) d -> n (lf lq) m d", **axes)
        return rearrange(decoded, "(lf n) (lq m r) d -> n (lf lq) m r d", r=self.rank, **axes)


def _blocks(latent_size: int, heads: AttentionHeads, num_blocks: int, num_self_attn: int, shared: bool) -> list[Layer]:
    """The encoder's layers, block after block; a shared layer occurs several times."""

    def cross_attention() -> Layer:
        return Layer(latent_size, heads, cross=True)

    def block() -> list[Layer]:
        return [cross_attention(), *(Layer(latent_size, heads, cross=False) for _ in range(num_self_attn))]

    first = block()
    if not shared:
        return first + [layer for _ in range(num_blocks - 1) for layer in block()]
    return first + [cross_attention(), *first[1:]] * (num_blocks - 1)
