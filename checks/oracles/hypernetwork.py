"""The whole hypernetwork: from features of each chunk alone to the A and B of each context.

Sources: Doc-to-LoRA (arXiv:2602.15902); parameters under the names of SakanaAI/doc-to-lora@baa85db, whose formulas these
are: Perceiver without biases and positions, grouped-query attention (four query heads to a key head, scale
1 / sqrt(head size)), `x += RMS(attn(RMS(x), RMS(context)))` and `x += RMS(SwiGLU(RMS(x)))` with RMSNorm of eps 1e-6; residual
MLPs `x + LN(W2 silu(W1 LN(x)))`; a linear head on e / |e|, first d_in values A, the next d_out B, each times its scaler.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

_RMS_EPS = 1e-6
_QUERIES_PER_KEY = 4
_PERCEIVER = "aggregator.perceiver"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What decides which formulas apply; names are those of the run's configuration.

    Attributes:
        modules: (d_in, d_out) of each target module.
        n_layers: decoder layers of the base.
        per_layer_features: whether every layer's latents come from its own features.
        side_by_side: whether features are `concat_layers`, which one Linear brings to the latent size.
    """

    modules: Mapping[str, tuple[int, int]]
    n_layers: int
    lora_r: int
    per_layer_features: bool
    side_by_side: bool = False
    num_blocks: int = 8
    num_self_attn_per_block: int = 0
    shared_weights: bool = False
    num_pre_head_layers: int = 1
    per_layer_processing: bool = True
    use_bias: bool = True
    perceiver_heads: int = 16
    perceiver_head_dim: int = 128

    @property
    def scale(self) -> float:
        """Return the factor of every delta: 2 r^1.5, not divided by the rank."""
        return 2 * self.lora_r**1.5


@dataclass(frozen=True, eq=False)
class Merged:
    """The LoRA of one context: module name -> [L, R, d], R = (largest number of chunks + 1) * r."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]


def loras(
    parameters: Mapping[str, Tensor], switches: Switches, features: Sequence[Tensor], n_chunks: Sequence[int]
) -> list[Merged]:
    """Return the LoRA of every context, float64.

    Args:
        parameters: of the hypernetwork, by the reference's names.
        features: of every chunk alone, [L, S, F] where layers have their own features, else [S, F]; chunks of the first
            context first.
        n_chunks: chunks of each context.
    """
    weights = {name: value.double() for name, value in parameters.items()}
    rows = [chunk_rows(weights, switches, latents_of(weights, switches, x.double())) for x in features]
    merged, start = [], 0
    for count in n_chunks:
        own = rows[start : start + count]
        start += count
        A = {
            name: _stacked(weights, switches, [a[name] for a, _ in own], f"bias_A.{name}", n_chunks)
            for name in own[0][0]
        }
        B = {
            name: _stacked(weights, switches, [b[name] for _, b in own], f"bias_B.{name}", n_chunks)
            for name in own[0][1]
        }
        merged.append(Merged(A, B))
    return merged


def _stacked(
    weights: Mapping[str, Tensor], switches: Switches, chunks: list[Tensor], bias: str, n_chunks: Sequence[int]
) -> Tensor:
    """Stack rows along the rank: the chunks in order, the bias, zeros up to the rank of the longest context."""
    blocks = [*chunks, weights[bias]] if switches.use_bias else list(chunks)
    missing = max(n_chunks) + 1 - len(blocks)
    return torch.cat([*blocks, *[torch.zeros_like(chunks[0])] * missing], dim=1)


def latents_of(weights: Mapping[str, Tensor], switches: Switches, features: Tensor) -> list[list[list[Tensor]]]:
    """Return the latents of one chunk, [layer][module][rank] of a vector [D]."""
    modules, ranks = len(switches.modules), switches.lora_r
    sets = list(features) if switches.per_layer_features else [features]
    decoded = [_perceived(weights, switches, one) for one in sets]  # each [latents, D]
    latents = []
    for layer in range(switches.n_layers):
        own = decoded[layer] if switches.per_layer_features else decoded[0]
        first = 0 if switches.per_layer_features else layer * modules * ranks
        latents.append([[own[first + module * ranks + rank] for rank in range(ranks)] for module in range(modules)])
    return latents


def _perceived(weights: Mapping[str, Tensor], switches: Switches, features: Tensor) -> Tensor:
    """Resample one chunk's features [S, F] to the decoder's latents [n, D]."""
    projection = f"{_PERCEIVER}.modality_projection"
    linear = switches.side_by_side
    context = features @ weights[f"{projection}.weight"].T if linear else _swiglu(weights, projection, features)
    latents = weights[f"{_PERCEIVER}.encoder.latents_q"]
    size = 1 + switches.num_self_attn_per_block
    for block in range(switches.num_blocks):
        for place in range(size):
            number = block * size + place
            if switches.shared_weights and block > 0:  # the first block's layers, but a cross-attention of their own
                number = size if place == 0 else place
            latents = _layer(weights, switches, f"{_PERCEIVER}.encoder.layers.{number}", latents, context, place == 0)
    encoded = _rms(latents, weights[f"{_PERCEIVER}.encoder.layernorm.weight"])
    queries = weights[f"{_PERCEIVER}.decoder.latents_q"]
    decoded = _layer(weights, switches, f"{_PERCEIVER}.decoder.layers.0", queries, encoded, True)
    return _rms(decoded, weights[f"{_PERCEIVER}.decoder.layernorm.weight"])


def _layer(
    weights: Mapping[str, Tensor], switches: Switches, name: str, latents: Tensor, context: Tensor, cross: bool
) -> Tensor:
    """Attend from latents to a context, or to themselves, then the SwiGLU; both residual, normed before and after."""
    normed = _rms(latents, weights[f"{name}.input_latents_layernorm.weight"])
    keys = _rms(context, weights[f"{name}.input_context_layernorm.weight"]) if cross else normed
    attended = _attention(weights, switches, f"{name}.self_attn", normed, keys)
    latents = latents + _rms(attended, weights[f"{name}.post_attention_layernorm.weight"])
    passed = _swiglu(weights, f"{name}.mlp", _rms(latents, weights[f"{name}.pre_ff_layernorm.weight"]))
    return latents + _rms(passed, weights[f"{name}.post_ff_layernorm.weight"])


def _attention(
    weights: Mapping[str, Tensor], switches: Switches, name: str, latents: Tensor, context: Tensor
) -> Tensor:
    """Attend from latents [q, D] to a context [s, D], head by head."""
    size = switches.perceiver_head_dim
    query, key, value = (
        x @ weights[f"{name}.{part}_proj.weight"].T for part, x in (("q", latents), ("k", context), ("v", context))
    )
    mixed = []
    for head in range(switches.perceiver_heads):
        own, shared = slice(head * size, (head + 1) * size), head // _QUERIES_PER_KEY
        theirs = slice(shared * size, (shared + 1) * size)
        scores = query[:, own] @ key[:, theirs].T / math.sqrt(size)
        mixed.append(torch.softmax(scores, dim=-1) @ value[:, theirs])
    return torch.cat(mixed, dim=-1) @ weights[f"{name}.o_proj.weight"].T


def _swiglu(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = x @ weights[f"{name}.gate_proj.weight"].T, x @ weights[f"{name}.up_proj.weight"].T
    return (silu(gate) * up) @ weights[f"{name}.down_proj.weight"].T


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + _RMS_EPS).sqrt()


def chunk_rows(
    weights: Mapping[str, Tensor], switches: Switches, latents: list[list[list[Tensor]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a chunk's A and B, module name -> [L, r, d], from its latents [layer][module][rank]."""
    A: dict[str, list[Tensor]] = {}
    B: dict[str, list[Tensor]] = {}
    for module, name in enumerate(sorted(switches.modules)):
        d_in, d_out = switches.modules[name]
        for layer in range(switches.n_layers):
            x = torch.stack(latents[layer][module])  # [r, D]
            for depth in range(switches.num_pre_head_layers):
                x = _residual(weights, switches, depth, layer, x)
            head = weights["head.weight"][layer]  # [D, row], or with several modules [M, D, row]
            length = x.norm(dim=-1, keepdim=True)
            rows = (x / torch.where(length > 0, length, 1.0)) @ (head if head.ndim == 2 else head[module])
            A.setdefault(name, []).append(rows[:, :d_in] * weights[f"scaler_A.{name}"][0, layer])
            B.setdefault(name, []).append(rows[:, d_in : d_in + d_out] * weights[f"scaler_B.{name}"][0, layer])
    return {name: torch.stack(a) for name, a in A.items()}, {name: torch.stack(b) for name, b in B.items()}


def _residual(weights: Mapping[str, Tensor], switches: Switches, depth: int, layer: int, x: Tensor) -> Tensor:
    """Add LN(W2 silu(W1 LN(x))) to x [r, D]; W1 and W2 are one for all layers, or each layer's own."""
    if switches.per_layer_processing:
        name, (first, second, last) = f"layers.{depth}.layers", (1, 3, 4)
        maps = [
            (weights[f"{name}.{part}.weight"][layer], weights[f"{name}.{part}.bias"][0, layer, 0, 0])
            for part in (first, second)
        ]
    else:
        name, (first, second, last) = f"layers.{depth}.mlp", (2, 5, 6)
        maps = [(weights[f"{name}.{part}.weight"].T, weights[f"{name}.{part}.bias"]) for part in (first, second)]
    (w1, b1), (w2, b2) = maps
    normed = layer_norm(x, x.shape[-1:], weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
    hidden = silu(normed @ w1 + b1) @ w2 + b2
    return x + layer_norm(hidden, x.shape[-1:], weights[f"{name}.{last}.weight"], weights[f"{name}.{last}.bias"])
