"""Features of document chunks → a LoRA per chunk: the aggregator, the per-layer heads, and a learned bias LoRA.

Shape legend: n = chunks, L = layers, M = target modules in order of name, r = rank, D = latent size.
Parameter names and initial distributions are those of the reference implementation (SakanaAI/doc-to-lora).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix
from torch import Tensor, nn

from d2l.config.schema import RunConfig
from d2l.errors import ModelError
from d2l.hypernet.lora import Lora
from d2l.hypernet.perceiver import PUBLISHED_HEADS, AttentionHeads, Perceiver, Segments

MLP_RATIO = 4
ZERO_LATENT = 1e-6  # a latent shorter than this is not stretched to length 1: a zero latent stays zero


@dataclass(frozen=True, kw_only=True)
class HypernetShape:
    """Everything that fixes the parameters of a hypernetwork.

    Attributes:
        modules: (d_in, d_out) of each target module, the same in every layer.
        n_layers: decoder layers of the base.
        feature_size: hidden size of the context encoder.
        per_layer_features: whether the context encoder gives features of every layer, or one set of features.
        use_bias: whether a learned LoRA that no document changes is added to every document's.
        per_layer_processing: whether the residual MLPs before the head have weights of their own for every layer.
        The others: see `Perceiver`.
    """

    modules: Mapping[str, tuple[int, int]]
    n_layers: int
    feature_size: int
    per_layer_features: bool
    linear_projection: bool = False
    query_scale: float = 1.0
    rank: int
    latent_size: int
    heads: AttentionHeads = PUBLISHED_HEADS
    n_latent_queries: int
    num_blocks: int
    num_self_attn_per_block: int
    shared_weights: bool
    per_rank_gen: bool
    per_layer_processing: bool
    num_pre_head_layers: int
    use_bias: bool

    @classmethod
    def of(
        cls, config: RunConfig, modules: Mapping[str, tuple[int, int]], *, n_layers: int, feature_size: int
    ) -> "HypernetShape":
        """The shape that a configuration asks for on a base with these sizes."""
        return cls(
            modules=modules,
            n_layers=n_layers,
            feature_size=feature_size,
            per_layer_features=config.ctx_encoder_type == "per_layer_activations",
            linear_projection=config.ctx_encoder_type == "concat_layers",
            query_scale=config.perceiver_query_scale,
            rank=config.lora_r,
            latent_size=config.latent_size,
            heads=AttentionHeads(config.perceiver_heads, config.perceiver_head_dim),
            n_latent_queries=config.n_latent_queries,
            num_blocks=config.num_blocks,
            num_self_attn_per_block=config.num_self_attn_per_block,
            shared_weights=config.shared_weights,
            per_rank_gen=config.per_rank_gen,
            per_layer_processing=config.per_layer_processing,
            num_pre_head_layers=config.num_pre_head_layers,
            use_bias=config.use_bias,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Target modules in the order of the latents' module axis."""
        return tuple(sorted(self.modules))

    @property
    def scale(self) -> float:
        """Factor of every LoRA delta, applied directly: 2·r^1.5 (not divided by the rank)."""
        return 2 * self.rank**1.5

    @property
    def row_size(self) -> int:
        """Values that the head makes per rank: a row of A and a row of B of the largest module."""
        return max(d_in + d_out for d_in, d_out in self.modules.values())


class Hypernetwork(nn.Module):
    """Aggregator, residual MLPs on its latents, a linear head per layer and module, and scalers on what it makes."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        self.shape = shape
        self.aggregator = Perceiver(
            feature_size=shape.feature_size,
            latent_size=shape.latent_size,
            n_layers=shape.n_layers,
            n_modules=len(shape.modules),
            rank=shape.rank,
            heads=shape.heads,
            n_latent_queries=shape.n_latent_queries,
            num_blocks=shape.num_blocks,
            num_self_attn_per_block=shape.num_self_attn_per_block,
            shared_weights=shape.shared_weights,
            per_rank_gen=shape.per_rank_gen,
            per_layer_features=shape.per_layer_features,
            linear_projection=shape.linear_projection,
            query_scale=shape.query_scale,
        )
        self.layers = nn.ModuleList(_pre_head(shape) for _ in range(shape.num_pre_head_layers))
        if shape.use_bias:
            self.bias_A = nn.ParameterDict({name: _bias_rows(shape, shape.modules[name][0]) for name in shape.names})
            self.bias_B = nn.ParameterDict(
                {name: torch.zeros(shape.n_layers, shape.rank, shape.modules[name][1]) for name in shape.names}
            )
        scaler = (1, shape.n_layers, shape.rank, 1)
        self.scaler_A = nn.ParameterDict({name: torch.ones(scaler) for name in shape.names})
        # B starts at zero, so the LoRA starts at zero; the bias and scaler_B are what learns first.
        self.scaler_B = nn.ParameterDict({name: torch.zeros(scaler) for name in shape.names})
        self.head = _head(shape)

    def forward(self, features: Tensor, segments: Segments) -> Lora:
        """One LoRA per chunk, without the bias: A [n, L, r, d_in] and B [n, L, r, d_out] for each target module.

        Args:
            features, segments: see `Perceiver.forward`.

        Raises:
            ModelError: the features or the latents do not have the shape that the heads need.
        """
        return self.lora(self.aggregator(features, segments))

    def lora(self, latents: Tensor) -> Lora:
        """Latents [n, L, M, r, D] → a LoRA per chunk.

        Raises:
            ModelError: the latents have another shape. Broadcasting them would give every rank the same values.
        """
        shape = self.shape
        expected = (shape.n_layers, len(shape.modules), shape.rank, shape.latent_size)
        if latents.shape[1:] != expected:
            raise ModelError(
                "the head needs latents [chunks, layers, modules, rank, latent_size] = "
                f"[n, {', '.join(map(str, expected))}], but the aggregator gave {list(latents.shape)}; "
                "set `per_rank_gen: true`, so that it makes one latent for every rank"
            )
        for layer in self.layers:
            latents = layer(latents)
        rows = self.head(F.normalize(latents, dim=-1, eps=ZERO_LATENT))
        A, B = {}, {}
        for module, name in enumerate(shape.names):
            d_in, d_out = shape.modules[name]
            a, b, _ = rows[:, :, module].split([d_in, d_out, shape.row_size - d_in - d_out], dim=-1)
            A[name], B[name] = a * self.scaler_A[name], b * self.scaler_B[name]
        return Lora(A, B, shape.scale)

    def bias(self) -> Lora | None:
        """The learned LoRA that every document shares, [1, L, r, d]; None without `use_bias`."""
        if not self.shape.use_bias:
            return None
        A = {name: self.bias_A[name][None] for name in self.shape.names}
        B = {name: self.bias_B[name][None] for name in self.shape.names}
        return Lora(A, B, self.shape.scale)


class SharedResidual(nn.Module):
    """`x + LN(W2 silu(W1 LN(x)))`, one W1 and W2 for all layers. The reference has dropouts of 0 at steps 1 and 4."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        size, hidden = shape.latent_size, MLP_RATIO * shape.latent_size
        self.mlp = _residual_branch({"2": nn.Linear(size, hidden), "5": nn.Linear(hidden, size)}, size, last="6")

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.mlp(latents)


class PerLayerResidual(nn.Module):
    """`x + LN(W2 silu(W1 LN(x)))` with W1 and W2 of its own for every layer of the base."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        size, hidden = shape.latent_size, MLP_RATIO * shape.latent_size

        def per_layer(i: int, o: int) -> EinMix:
            pattern = "n l m r i -> n l m r o"
            return EinMix(pattern, weight_shape="l i o", bias_shape="l o", l=shape.n_layers, i=i, o=o)

        self.layers = _residual_branch({"1": per_layer(size, hidden), "3": per_layer(hidden, size)}, size, last="4")

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.layers(latents)


def _residual_branch(maps: Mapping[str, nn.Module], size: int, last: str) -> nn.Sequential:
    """LayerNorm, first map, SiLU, second map, LayerNorm, under the reference's numbers."""
    (first_name, first), (second_name, second) = maps.items()
    steps = {
        "0": nn.LayerNorm(size),
        first_name: first,
        "silu": nn.SiLU(),
        second_name: second,
        last: nn.LayerNorm(size),
    }
    return nn.Sequential(OrderedDict(steps))


def _pre_head(shape: HypernetShape) -> nn.Module:
    return PerLayerResidual(shape) if shape.per_layer_processing else SharedResidual(shape)


def _bias_rows(shape: HypernetShape, d_in: int) -> Tensor:
    """[L, r, d_in] from N(0, 0.2 / sqrt(d_in · r))."""
    return torch.randn(shape.n_layers, shape.rank, d_in) * (0.2 / (d_in * shape.rank) ** 0.5)


def _head(shape: HypernetShape) -> EinMix:
    """Latent → row, from N(0, 0.5 / sqrt(D + row_size · r)); as in the reference, one module has no module axis."""
    weight_shape = "l m d o" if len(shape.modules) > 1 else "l d o"
    head = EinMix(
        "n l m r d -> n l m r o",
        weight_shape=weight_shape,
        l=shape.n_layers,
        m=len(shape.modules),
        d=shape.latent_size,
        o=shape.row_size,
    )
    nn.init.normal_(head.weight, std=0.5 / (shape.latent_size + shape.row_size * shape.rank) ** 0.5)
    return head
