"""The hypernetwork, features of chunks → a LoRA per chunk: aggregator, per-layer heads, and a learned bias LoRA.

Shape legend: n = chunks, L = layers, M = target modules in order of name, r = rank, D = latent size.
Parameter names and initial distributions are those of the reference implementation (SakanaAI/doc-to-lora).
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix
from torch import Tensor, nn

from d2l.base.segments import Segments
from d2l.errors import ModelError
from d2l.hypernet.lora import Lora
from d2l.hypernet.perceiver import Perceiver
from d2l.hypernet.shape import MLP_RATIO, HypernetShape

ZERO_LATENT = 1e-6  # a latent shorter than this is not stretched to length 1: a zero latent stays zero


class Hypernetwork(nn.Module):
    """Aggregator, residual MLPs on its latents, a linear head per layer and module, and scalers on what it makes."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        self.shape = shape
        self.aggregator = Perceiver(shape)
        self.layers = nn.ModuleList(_pre_head(shape) for _ in range(shape.config.num_pre_head_layers))
        rows = (shape.n_layers, shape.config.lora_r)
        if shape.config.use_bias:
            self.bias_A = nn.ParameterDict({name: _bias_rows(shape, shape.modules[name][0]) for name in shape.names})
            self.bias_B = nn.ParameterDict({name: torch.zeros(*rows, shape.modules[name][1]) for name in shape.names})
        scaler = (1, *rows, 1)
        self.scaler_A = nn.ParameterDict({name: torch.ones(scaler) for name in shape.names})
        # B starts at zero, so the LoRA starts at zero; the bias and scaler_B are what learns first.
        self.scaler_B = nn.ParameterDict({name: torch.zeros(scaler) for name in shape.names})
        self.head = _head(shape)

    def forward(self, features: Tensor, chunks: Segments) -> Lora:
        """Make a LoRA per chunk, without the bias: A [n, L, r, d_in] and B [n, L, r, d_out] for each target module.

        Args:
            features, chunks: see `Perceiver.forward`.

        Raises:
            ModelError: the features or the latents do not have the shape that the heads need.
        """
        return self.lora(self.aggregator(features, chunks))

    def lora(self, latents: Tensor) -> Lora:
        """Map latents [n, L, M, r, D] to a LoRA per chunk.

        Raises:
            ModelError: the latents have another shape. Broadcasting them would give every rank the same values.
        """
        shape = self.shape
        expected = (shape.n_layers, len(shape.names), shape.config.lora_r, shape.config.latent_size)
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
        """Return the learned LoRA that every document shares, [1, L, r, d]; None without `use_bias`."""
        if not self.shape.config.use_bias:
            return None
        A = {name: self.bias_A[name][None] for name in self.shape.names}
        B = {name: self.bias_B[name][None] for name in self.shape.names}
        return Lora(A, B, self.shape.scale)


class SharedResidual(nn.Module):
    """`x + LN(W2 silu(W1 LN(x)))`, one W1 and W2 for all layers. The reference has dropouts of 0 at steps 1 and 4."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        size, hidden = shape.config.latent_size, MLP_RATIO * shape.config.latent_size
        self.mlp = _residual_branch({"2": nn.Linear(size, hidden), "5": nn.Linear(hidden, size)}, size, last="6")

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.mlp(latents)


class PerLayerResidual(nn.Module):
    """`x + LN(W2 silu(W1 LN(x)))` with W1 and W2 of its own for every layer of the base."""

    def __init__(self, shape: HypernetShape) -> None:
        super().__init__()
        size, hidden = shape.config.latent_size, MLP_RATIO * shape.config.latent_size

        def per_layer(i: int, o: int) -> EinMix:
            pattern = "n l m r i -> n l m r o"
            return EinMix(pattern, weight_shape="l i o", bias_shape="l o", l=shape.n_layers, i=i, o=o)

        self.layers = _residual_branch({"1": per_layer(size, hidden), "3": per_layer(hidden, size)}, size, last="4")

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.layers(latents)


def _residual_branch(maps: Mapping[str, nn.Module], size: int, last: str) -> nn.Sequential:
    """Chain LayerNorm, first map, SiLU, second map and LayerNorm, under the reference's numbers."""
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
    return PerLayerResidual(shape) if shape.config.per_layer_processing else SharedResidual(shape)


def _bias_rows(shape: HypernetShape, d_in: int) -> Tensor:
    """Draw [L, r, d_in] from N(0, 0.2 / sqrt(d_in · r))."""
    rank = shape.config.lora_r
    return torch.randn(shape.n_layers, rank, d_in) * (0.2 / (d_in * rank) ** 0.5)


def _head(shape: HypernetShape) -> EinMix:
    """Make the map from latent to row, from N(0, 0.5 / sqrt(D + row_size · r)); as in the reference, one module has no
    module axis.
    """
    weight_shape = "l m d o" if len(shape.names) > 1 else "l d o"
    head = EinMix(
        "n l m r d -> n l m r o",
        weight_shape=weight_shape,
        l=shape.n_layers,
        m=len(shape.names),
        d=shape.config.latent_size,
        o=shape.row_size,
    )
    nn.init.normal_(head.weight, std=0.5 / (shape.config.latent_size + shape.row_size * shape.config.lora_r) ** 0.5)
    return head
