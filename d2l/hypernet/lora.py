"""The LoRA that a document becomes: the value, merging a document's chunks, and binding it to the base for a scope.

Shape legend: n = contexts (chunks, before merging), L = decoder layers, r = rank of a chunk, R = rank after merging.
A delta is `scale · (x Aᵀ) B` with A [R, d_in] and B [R, d_out]; the scale is applied directly, not divided by the rank.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from d2l.base.grouped import ONE_KERNEL_FOR_ALL
from d2l.base.segments import Segments
from d2l.base.transfer import moved
from d2l.hypernet.targets import Targets


@dataclass(frozen=True, eq=False)
class Lora:
    """Low-rank updates of the target modules, for several contexts at once.

    Attributes:
        A: module name → [n, L, R, d_in].
        B: module name → [n, L, R, d_out].
        scale: factor of every delta.
        bias_rank: how many of the last ranks before the padding hold the learned bias, which every document shares.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: float
    bias_rank: int = 0

    @property
    def n_contexts(self) -> int:
        return next(iter(self.A.values())).shape[0]

    @property
    def rank(self) -> int:
        return next(iter(self.A.values())).shape[2]

    def __getitem__(self, contexts: int | slice) -> "Lora":
        """Return one context (still with an axis n = 1) or a slice of them."""
        if isinstance(contexts, int):
            index = range(self.n_contexts)[contexts]
            contexts = slice(index, index + 1)
        return self._map(lambda x: x[contexts])

    def zeroed(self) -> "Lora":
        """Return the same shapes, all zero: bound, it leaves the base as it is."""
        return self._map(torch.zeros_like)

    def l1(self) -> Tensor:
        """Return the mean over modules of mean |A| + mean |B|, zero rows included (`gen_lora_l1_reg_coef` weighs it)."""
        return torch.stack([self.A[name].abs().mean() + self.B[name].abs().mean() for name in self.A]).mean()

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Lora":
        A, B = ({name: function(x) for name, x in side.items()} for side in (self.A, self.B))
        return replace(self, A=A, B=B)


def merge_chunks(chunks: Lora, n_chunks: Sequence[int], bias: Lora | None = None) -> Lora:
    """Merge the chunks of each context into one LoRA by concatenation along the rank.

    Rows of each context: its chunks in order, the bias, then zeros up to a common rank R = r · (max(n_chunks) + 1).

    Args:
        chunks: a LoRA per chunk, chunks of the first context first.
        n_chunks: chunks of each context.
        bias: the LoRA [1, L, r, d] that every context shares.

    Raises:
        ValueError: the contexts have more or fewer chunks than the LoRA.
    """
    if sum(n_chunks) != chunks.n_contexts:
        raise ValueError(
            f"n_chunks {tuple(n_chunks)} adds up to {sum(n_chunks)}, but the LoRA has {chunks.n_contexts} chunks"
        )
    n, longest = chunks.n_contexts, max(n_chunks)
    place = torch.tensor(  # which block stands where in each context: chunks 0 … n - 1, the bias n, zeros n + 1
        [
            [*range(end - count, end), n, *[n + 1] * (longest - count)]
            for count, end in zip(n_chunks, accumulate(n_chunks), strict=True)
        ]
    )

    device = next(iter(chunks.A.values())).device
    places, axes = moved(place.flatten(), device), {"n": len(n_chunks)}

    def merged(blocks: Tensor, bias_block: Tensor | None) -> Tensor:
        zeros = torch.zeros_like(blocks[:1])
        table = torch.cat([blocks, zeros if bias_block is None else bias_block, zeros])
        return rearrange(table.index_select(0, places), "(n k) l r d -> n l (k r) d", **axes)

    A = {name: merged(a, bias.A[name] if bias else None) for name, a in chunks.A.items()}
    B = {name: merged(b, bias.B[name] if bias else None) for name, b in chunks.B.items()}
    return Lora(A, B, chunks.scale, bias.rank if bias else 0)


def bind(
    targets: Targets, lora: Lora, tokens: Segments | None = None, *, rows: Sequence[int] | None = None
) -> AbstractContextManager[None]:
    """Add the LoRA's delta to the outputs of the targets while the context is open; outside it the base is untouched.

    Bindings nest: the innermost alone acts. A binding belongs to the thread (the `contextvars` context) that opened it.
    Contexts lie one after another in the flattened tokens; their lengths are given in one of two units.

    Args:
        targets: from `find_targets`; their names are the LoRA's.
        lora: one entry per context; cast to the dtype and device of each target's output.
        tokens: the tokens of each context, for packed rows.
        rows: the batch rows of each context, where all have as many tokens as the input brings: padded queries, or
            generation, where the length changes at every step.

    Raises:
        ValueError: the LoRA, the targets and the contexts do not fit; within the context, the input's tokens do not.
    """
    if (tokens is None) == (rows is None):
        raise ValueError("bind takes either the tokens or the rows of each context")
    counts, unit = (tuple(rows or ()), "rows") if tokens is None else (tokens.lengths, "tokens")
    layers = {len(modules) for modules in targets.values()} | {a.shape[1] for a in lora.A.values()}
    if set(targets) != set(lora.A) or len(layers) != 1 or len(counts) != lora.n_contexts:
        raise ValueError(
            f"cannot bind a LoRA for {sorted(lora.A)} and {lora.n_contexts} contexts to {sorted(targets)} with "
            f"{unit} of {len(counts)} contexts; layers: {sorted(layers)}"
        )
    lengths = partial(_row_lengths if tokens is None else _token_lengths, counts)
    # unbind, not [:, layer]: its backward is one stack; each index would make a gradient of the size of all layers.
    slots = [
        _Slot(module, a, b, lora.scale, lengths)
        for name, modules in targets.items()
        for module, a, b in zip(modules, lora.A[name].unbind(1), lora.B[name].unbind(1), strict=True)
    ]
    return _Activation(slots)


def _token_lengths(counts: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    """Return the tokens of each context, which must add up to those of the input."""
    if sum(counts) != n_tokens:
        raise ValueError(
            f"the bound LoRA covers {sum(counts)} tokens in contexts of {counts}, but the input has {n_tokens} tokens"
        )
    return counts


def _row_lengths(counts: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    """Return the tokens of each context from its rows, which must divide those of the input."""
    total = sum(counts)
    if total == 0 or n_tokens % total:
        raise ValueError(
            f"the bound LoRA covers {total} rows in contexts of {counts}, but the input has {n_tokens} tokens"
        )
    return tuple(count * (n_tokens // total) for count in counts)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts of `torch.utils.checkpoint` with `use_reentrant=False`, as its `context_fn`.

    Recompute runs under the binding of its forward, whatever is bound by then and whatever thread runs the backward.
    """
    return nullcontext(), _Activation(_active.get())


@dataclass(frozen=True, eq=False)
class _Slot:
    """A LoRA at one target: A [n, R, d_in] and B [n, R, d_out]."""

    module: nn.Module
    A: Tensor
    B: Tensor
    scale: float
    lengths: Callable[[int], tuple[int, ...]]  # tokens of the input → tokens of each context

    def add_delta(self, x: Tensor, output: Tensor) -> Tensor:
        """Return `output` plus the delta for input `x`; A and B are never repeated per token.

        One batched product where contexts are equally long, else a grouped one where the device has it, else a product
        per context. Measured on one CPU thread, 2880 → 4096, R 16, 4096 tokens, forward and backward, at 1, 8 and 32
        contexts: 1.06–1.10 times the Linear alone (medians of five; earlier and beside other work up to 1.2).
        Padding the contexts, or one wide product with a block mask, took 1.1–1.6 times, and padding 8 times where one
        is long.
        """
        dtype = self._product_dtype(output.dtype)
        tokens, A, B = x.flatten(0, -2).to(dtype), self.A.to(output.device, dtype), self.B.to(output.device, dtype)
        lengths = self.lengths(tokens.shape[0])
        if len(set(lengths)) == 1:
            shape = (len(lengths), lengths[0], -1)
            summed = torch.baddbmm(output.reshape(shape).to(dtype), tokens.reshape(shape) @ A.mT, B, alpha=self.scale)
            return summed.reshape(output.shape).to(output.dtype)
        if has_grouped_products(tokens, A, B, lengths):
            ends = _ends(lengths, tokens.device)
            reduced = functional.grouped_mm(tokens, A.mT, offs=ends) * self.scale
            return output + functional.grouped_mm(reduced, B, offs=ends).reshape(output.shape)
        # split and unbind have linear-time backwards; slices would each make a gradient of the size of the whole row.
        pieces = zip(tokens.split(lengths), A.unbind(), B.unbind(), strict=True)
        delta = torch.cat([(piece @ a.mT * self.scale) @ b for piece, a, b in pieces])
        return (output + delta.reshape(output.shape)).to(output.dtype)

    def _product_dtype(self, output: torch.dtype) -> torch.dtype:
        """Return the dtype of the products, for outputs of this one: the wider of it and the LoRA's, unless the LoRA trains.

        As in the reference, whose training runs under autocast and whose answers do not. Beside a bfloat16 base, float32
        products come to the sum rounded once; in training they would keep a float32 copy of each target's input.
        """
        return output if self.A.requires_grad else torch.promote_types(output, self.A.dtype)


def has_grouped_products(tokens: Tensor, A: Tensor, B: Tensor, lengths: Sequence[int]) -> bool:
    """Return whether one kernel multiplies all contexts: in bfloat16 on SM 90 and 100, where rows have whole 16 bytes.

    Other GPUs would loop over the contexts, and ask the host for their lengths.
    """
    aligned = all(size % 8 == 0 for size in (tokens.shape[-1], A.shape[-2], B.shape[-1]))
    if not (tokens.is_cuda and tokens.dtype == torch.bfloat16 and aligned and all(lengths)):
        return False
    return torch.cuda.get_device_capability(tokens.device)[0] in ONE_KERNEL_FOR_ALL


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each context ends in the row, int32 [n]; the same tensor for all layers of a pass."""
    return moved(torch.tensor([*accumulate(lengths)], dtype=torch.int32), device)


_active: ContextVar[Sequence[_Slot]] = ContextVar("active_lora", default=())


class _Activation:
    """A binding that is opened as often as needed and nested, in one thread at a time; without slots, the base alone."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self._slots = slots
        self._opened: list[ExitStack] = []

    def __enter__(self) -> None:
        opening = list(self._slots)  # a new object: its identity tells the hooks of this opening from all others
        undo = ExitStack()
        undo.callback(_active.reset, _active.set(opening))
        for slot in opening:
            undo.callback(slot.module.register_forward_hook(partial(_add_delta, opening, slot)).remove)
        self._opened.append(undo)

    def __exit__(self, *error: object) -> None:
        self._opened.pop().close()


def _add_delta(
    opening: Sequence[_Slot],
    slot: _Slot,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor | tuple[Tensor, ...],
) -> Tensor | tuple[Tensor, ...] | None:
    """Add a slot's delta, as a forward hook, for the opening that is active in this thread and for no enclosing one."""
    if _active.get() is not opening:
        return None
    if isinstance(output, tuple):  # a Mixture-of-Experts block may return its router's scores behind the hidden states
        return (slot.add_delta(args[0], output[0]), *output[1:])
    return slot.add_delta(args[0], output)
