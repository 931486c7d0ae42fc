"""Running the Perceiver in pieces: what a piece computes is forgotten after its forward and recomputed in its backward.

A chunk is read under one layer's features by itself, so chunks and layers can be cut apart anywhere. Every piece gives
its own part of the parameters' gradients, in their dtype: under autocast the parts are summed in float32.

Shape legend: L = layers of the features, T = packed tokens, F = feature size, n = chunks, q = decoded latents of a
chunk, D = latent size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2l.base.segments import Segments
from d2l.base.transfer import moved
from d2l.hypernet import memory
from d2l.hypernet.memory import cut, total_bytes
from d2l.hypernet.shape import HypernetShape

Read = Callable[[Tensor, Segments], Tensor]  # features of some chunks [l, t, F] → [l, n, q, D]


def in_pieces(
    read: Read, features: Tensor, chunks: Segments, shape: HypernetShape, weights: Sequence[nn.Parameter]
) -> Tensor:
    """Read chunks piece by piece; where all of it is small, in one go for chunks of similar length.

    Args:
        read: reads chunks under features [l, t, F] into [l, n, q, D]; each chunk and layer by itself.
        features: [L, T, F].
        chunks: their tokens in `features`.
        weights: what `read` computes with, for gradients.

    Returns:
        [L, n, q, D].
    """
    width = torch.get_autocast_dtype(features.device.type) if _autocasts(features) else weights[0].dtype
    groups = cut(shape, chunks, width.itemsize)
    small = total_bytes(shape, groups, chunks, width.itemsize) <= memory.PIECE_BYTES
    decoded = []
    for group in groups:
        own = Segments(tuple(chunks.lengths[i] for i in group[0].chunks))
        tokens = None if len(own) == len(chunks) else moved(chunks.places(group[0].chunks), features.device)
        parts = []
        for piece in group:
            part = _Part(read, piece.layers, tokens, own)
            recomputed = not small and torch.is_grad_enabled()
            parts.append(_Recomputed.apply(part, features, *weights) if recomputed else part(features))
        decoded.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    if len(decoded) == 1:
        return decoded[0]
    order = torch.tensor([i for group in groups for i in group[0].chunks]).argsort()
    return torch.cat(decoded, dim=1).index_select(1, moved(order, features.device))


@dataclass(frozen=True)
class _Part:
    """Some chunks under some layers' features, to be read in one go; without tokens, all chunks of the row."""

    read: Read
    layers: range
    tokens: Tensor | None
    chunks: Segments

    def __call__(self, features: Tensor) -> Tensor:
        own = features[self.layers.start : self.layers.stop]
        return self.read(own if self.tokens is None else own.index_select(1, self.tokens), self.chunks)


class _Recomputed(torch.autograd.Function):
    """A part that keeps nothing but the features, which are there anyway.

    The checkpoints of PyTorch record the parameters' own graph: under autocast, one bfloat16 copy of each for all parts,
    in whose gradient, bfloat16 too, those of all parts would be summed.
    """

    @staticmethod
    def forward(ctx: Any, part: _Part, features: Tensor, *weights: Tensor) -> Tensor:
        device = features.device.type
        ctx.part, ctx.weights = part, weights
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(features)
        return part(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        needed = [kept.detach().requires_grad_(ctx.needs_input_grad[1]), *ctx.weights]
        wanted = [x for x in needed if x.requires_grad]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            decoded = ctx.part(needed[0])
        found = iter(torch.autograd.grad(decoded, wanted, gradient))
        return (None, *(next(found) if x.requires_grad else None for x in needed))


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
