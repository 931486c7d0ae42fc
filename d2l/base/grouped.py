"""Packed experts of a whole layer at once: routes sorted by expert, grouped products, and no wait for the host.

A layer's weights in bfloat16 are gigabytes, so they are dequantized a slice at a time. A slice holds some columns of *all*
experts rather than some experts: then its product reads every row at the same offsets, whose values the host never
knows, and nothing is multiplied twice. Slices of experts would have to pass over the rows of the experts before them.

Shapes: T tokens, K experts of each, R = T·K routes, E experts, H hidden and I intermediate size.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from d2l.base.mxfp4 import BLOCK, dequantize
from d2l.base.swiglu import clamped_swiglu

# Compute capabilities, major, where torch 2.11 to 2.13 multiply all groups in one kernel; on others it copies the
# offsets to the host and loops. Source: aten/src/ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`.
ONE_KERNEL_FOR_ALL = (9, 10)


class Projection(NamedTuple):
    """A projection of all experts in MXFP4: blocks [E, out, in / 32, 16], scales [E, out, in / 32], bias [E, out]."""

    blocks: Tensor
    scales: Tensor
    bias: Tensor

    def halves(self) -> "Projection":
        """View interleaved gate and up rows [E, 2 I, ...] as [E, 2, I, ...]: dequantized so, both are contiguous."""
        return Projection(*(part.unflatten(1, (-1, 2)).transpose(1, 2) for part in self))


@dataclass(frozen=True)
class Settings:
    """What an activation and its weights are: the SwiGLU's alpha and limit; most bytes of dequantized weights at a time."""

    alpha: float
    limit: float
    transient_bytes: int


class Routes(NamedTuple):
    """The routes sorted by expert, on the device of the router's choice.

    Attributes:
        order: [R] the route of each sorted row; route r is choice r % K of token r // K.
        experts: [R] the expert of each sorted row.
        ends: [E] int32, the number of rows up to the end of each expert's.
        rows: [T, K] the sorted row of each route.
    """

    order: Tensor
    experts: Tensor
    ends: Tensor
    rows: Tensor

    @classmethod
    def of(cls, router_indices: Tensor, experts: int) -> Self:
        """Sort router_indices [T, K]."""
        chosen, order = router_indices.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=order.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        places = torch.arange(len(order), device=order.device)
        rows = torch.empty_like(order).scatter_(0, order, places)
        return cls(order, chosen, ends, rows.view_as(router_indices))

    def gather(self, of_tokens: Tensor) -> Tensor:
        """Take what belongs to each row's token: [T, width] to [R, width]."""
        return of_tokens.index_select(0, self.order // self.rows.shape[1])

    def by_token(self, of_rows: Tensor) -> Tensor:
        """Take what belongs to each token's routes: [R, ...] to [T, K, ...]."""
        return of_rows.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)


def grouped_experts(
    hidden_states: Tensor,
    router_indices: Tensor,
    routing_weights: Tensor,
    gate_up: Projection,
    down: Projection,
    settings: Settings,
) -> Tensor:
    """Mix each token's experts; gradients reach hidden_states and routing_weights, and nothing dequantized is saved.

    Args:
        hidden_states: [T, H] bfloat16, float32 or float64; one kernel a product where it is bfloat16 on CUDA SM 90 or
            100. Elsewhere torch loops over the experts, on CUDA with a wait for the host.
        router_indices: [T, K] int64.
        routing_weights: [T, K].
        gate_up: interleaved rows [E, 2 I, ...]. down: [E, H, ...].

    Returns:
        [T, H].
    """
    experts, hidden = down.bias.shape
    matrix = gate_up.bias.shape[1] * hidden * hidden_states.dtype.itemsize
    routes = router_indices.numel()
    if not torch.is_grad_enabled() and routes < experts and routes * matrix <= settings.transient_bytes:
        return _with_copies(hidden_states, router_indices, routing_weights, gate_up, down, settings)
    mixed: Tensor = _GroupedExperts.apply(
        hidden_states, routing_weights.to(hidden_states.dtype), router_indices, settings, *gate_up, *down
    )
    return mixed


def _with_copies(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, gate_up: Projection, down: Projection, settings: Settings
) -> Tensor:
    """Mix few experts without gradients, each route by a copy of its own: a token of an answer takes 4 of 32 experts."""
    dtype, chosen = hidden_states.dtype, indices.flatten()
    gate_up, down = (Projection(*(part.index_select(0, chosen) for part in it)) for it in (gate_up.halves(), down))
    rows = hidden_states.repeat_interleave(indices.shape[1], dim=0).unsqueeze(1)
    both = rows @ dequantize(gate_up.blocks, gate_up.scales, dtype).flatten(1, 2).mT + gate_up.bias.flatten(1)[:, None]
    outputs = _activate(both, settings) @ dequantize(down.blocks, down.scales, dtype).mT + down.bias[:, None]
    return (outputs.view(*indices.shape, -1) * weights.to(dtype).unsqueeze(-1)).sum(1, dtype=dtype)


class _GroupedExperts(torch.autograd.Function):
    """Forward and backward of `grouped_experts`. Saved are bytes, routes, and what enters the activation."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weights: Tensor, indices: Tensor, settings: Settings, *packed: Tensor
    ) -> Tensor:
        gate_up, down = Projection(*packed[:3]), Projection(*packed[3:])
        experts, hidden = down.bias.shape
        routes, dtype = Routes.of(indices, experts), hidden_states.dtype
        both = _both(routes.gather(hidden_states), gate_up.halves(), routes, settings)
        activated = _joined([_activate(part, settings) for part in both])
        mixed = []
        for part in slices(hidden, experts * activated.shape[1] * dtype.itemsize, settings.transient_bytes):
            matrices = dequantize(down.blocks[:, part], down.scales[:, part], dtype)
            outputs = product(activated, matrices.mT, routes.ends)
            outputs += down.bias[:, part].index_select(0, routes.experts)
            mixed.append(routes.by_token(outputs).mul_(weights.unsqueeze(-1)).sum(1, dtype=dtype))
        ctx.settings = settings
        ctx.save_for_backward(weights, indices, *routes, *packed, *both)
        return _joined(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weights, indices, *saved = ctx.saved_tensors
        routes, gate_up, down, both = Routes(*saved[:4]), Projection(*saved[4:7]), Projection(*saved[7:10]), saved[10:]
        grad_weights, grad_both = _activation_backward(
            routes.gather(grad_output),
            weights.flatten().index_select(0, routes.order),
            both,
            down,
            routes,
            ctx.settings,
        )
        grad_hidden = _both_backward(grad_both, gate_up.halves(), routes, ctx.settings)
        of_biases = (grad_output @ down.bias.to(grad_output.dtype).T).gather(1, indices)
        return grad_hidden, routes.by_token(grad_weights) + of_biases, *[None] * 8


def _both(rows: Tensor, gate_up: Projection, routes: Routes, settings: Settings) -> list[Tensor]:
    """Project rows [R, H] to gate and up, slice by slice of I: each [R, 2 · slice], first all gates."""
    experts, _, width = gate_up.bias.shape
    both = []
    for part in slices(width, 2 * experts * rows.shape[1] * rows.dtype.itemsize, settings.transient_bytes):
        matrices = dequantize(gate_up.blocks[:, :, part], gate_up.scales[:, :, part], rows.dtype).flatten(1, 2)
        both.append(product(rows, matrices.mT, routes.ends))
        both[-1] += gate_up.bias[:, :, part].flatten(1).index_select(0, routes.experts)
    return both


def _activate(both: Tensor, settings: Settings) -> Tensor:
    """Turn [R, 2 · slice], first all gates, into [R, slice]."""
    gate, up = both.chunk(2, dim=-1)
    return clamped_swiglu(gate, up, settings.alpha, settings.limit)


def _activation_backward(
    grad_rows: Tensor, weights: Tensor, both: list[Tensor], down: Projection, routes: Routes, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Go back through the down projection and the activation.

    Args:
        grad_rows: [R, H] of each row's output, yet without its routing weight, in `weights` [R].

    Returns:
        The gradient of the routing weights [R], the share of the biases left out, and that of gates and ups [R, 2 I].
    """
    grad_weights, end = torch.zeros_like(weights), 0
    grad_both = grad_rows.new_empty(len(grad_rows), 2, down.blocks.shape[2] * BLOCK)
    for part in both:
        start, end = end, end + part.shape[1] // 2
        groups = slice(start // BLOCK, end // BLOCK)
        matrices = dequantize(down.blocks[:, :, groups], down.scales[:, :, groups], grad_rows.dtype)
        inner = product(grad_rows, matrices, routes.ends)
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            activated = _activate(leaf, settings)
        grad_weights += (inner * activated.detach()).sum(-1)
        (grad,) = torch.autograd.grad(activated, leaf, inner.mul_(weights.unsqueeze(-1)))
        grad_both[:, :, start:end] = grad.unflatten(1, (2, -1))
    return grad_weights, grad_both.flatten(1)


def _both_backward(grad_both: Tensor, gate_up: Projection, routes: Routes, settings: Settings) -> Tensor:
    """Go back through the gate and up projection: gradients [R, 2 I], first all gates, to those of the tokens [T, H]."""
    width = gate_up.blocks.shape[3] * BLOCK
    grads = []
    for part in slices(width, grad_both.dtype.itemsize * gate_up.bias.numel(), settings.transient_bytes):
        groups = slice(part.start // BLOCK, part.stop // BLOCK)
        parts = gate_up.blocks[:, :, :, groups], gate_up.scales[:, :, :, groups]
        matrices = dequantize(*parts, grad_both.dtype).flatten(1, 2)
        grads.append(routes.by_token(product(grad_both, matrices, routes.ends)).sum(1, dtype=grad_both.dtype))
    return _joined(grads)


def product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row by its expert's matrix.

    Args:
        rows: [R, in], sorted by expert. matrices: [E, in, out]. ends: [E] int32, the last one R.

    Returns:
        [R, out].
    """
    if not len(rows):
        return rows.new_empty(0, matrices.shape[2])
    if rows.dtype == torch.float64:  # of checks and tests on a CPU: torch has no grouped product of it
        parts = zip(rows.tensor_split(ends[:-1].long().cpu()), matrices, strict=True)
        return torch.cat([part @ matrix for part, matrix in parts])
    return grouped_mm(rows, matrices, offs=ends)


def smallest_transient(experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
    """Return the bytes of the smallest slice of dequantized weights that is computed at a time.

    It holds a block of columns of all experts: of their gate and up projections, or of the down projection.
    """
    return 2 * BLOCK * experts * max(hidden, intermediate) * dtype.itemsize


def slices(width: int, column_bytes: int, most_bytes: int) -> list[slice]:
    """Cut a width into slices as equal as blocks of 32 allow, of at most `most_bytes`, but of one block at least.

    Args:
        column_bytes: of one column of all experts' matrices.
    """
    blocks = width // BLOCK
    fitting = max(1, most_bytes // (column_bytes * BLOCK))
    count = -(-blocks // fitting)
    ends = [(blocks * number // count) * BLOCK for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _joined(parts: list[Tensor]) -> Tensor:
    """Put slices side by side; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
