"""Merging of several documents into one LoRA, with the formula that merges the chunks of one document.

Shape legend: L = decoder layers, R = rank of a document with its bias.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2l.hypernet.lora import Lora


def merge_documents(loras: Sequence[Lora]) -> Lora:
    """Merge documents: the chunks of all of them side by side along the rank, in order, then the shared bias once.

    Deltas add up as those of one document's chunks do: documents that are whole chunks each give the LoRA of one document
    that has these chunks.

    Args:
        loras: LoRAs of one context each, of one hypernetwork: A [1, L, R, d_in] and B [1, L, R, d_out].

    Raises:
        ValueError: there is none, one has several contexts, or they are not of one hypernetwork.
    """
    parts = [_remove_padding(lora) for lora in loras]
    _require_one_source(parts)
    last = parts[-1]
    ends = [part.rank - part.bias_rank for part in parts[:-1]] + [last.rank]

    def side_by_side(sides: Sequence[dict[str, Tensor]], name: str) -> Tensor:
        return torch.cat([side[name][:, :, :end] for side, end in zip(sides, ends, strict=True)], dim=2)

    A = {name: side_by_side([part.A for part in parts], name) for name in last.A}
    B = {name: side_by_side([part.B for part in parts], name) for name in last.B}
    return Lora(A, B, last.scale, last.bias_rank)


def _remove_padding(lora: Lora) -> Lora:
    """Remove the zeros behind the bias, which pad the shorter documents of a batch: whole blocks of the bias's rank."""
    if lora.n_contexts != 1:
        raise ValueError(f"documents are merged one context each, a LoRA has {lora.n_contexts}")
    block = max(lora.bias_rank, 1)
    filled = [side.detach().abs().amax(dim=(0, 1, 3)) > 0 for side in (*lora.A.values(), *lora.B.values())]
    places = torch.stack(filled).any(dim=0).nonzero().flatten().tolist()
    used = block * (1 + (places[-1] if places else 0) // block)
    A, B = ({name: x[:, :, :used] for name, x in side.items()} for side in (lora.A, lora.B))
    return Lora(A, B, lora.scale, lora.bias_rank)


def _require_one_source(parts: Sequence[Lora]) -> None:
    """Refuse LoRAs that differ in what every LoRA of a hypernetwork shares: modules, scale and bias."""
    if not parts:
        raise ValueError("no document to merge")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        shared = (part.scale, part.bias_rank, set(part.A)) == (first.scale, first.bias_rank, set(first.A))
        if not shared or not all(_same_bias(first, part, name) for name in first.A):
            raise ValueError(
                f"document {number} has another scale, bias or target than the first: of another checkpoint?"
            )


def _same_bias(one: Lora, other: Lora, name: str) -> bool:
    """Return whether two LoRAs end with the same bias in a module."""
    pairs = ((one.A[name], other.A[name]), (one.B[name], other.B[name]))
    return all(
        torch.equal(a[:, :, a.shape[2] - one.bias_rank :], b[:, :, b.shape[2] - one.bias_rank :]) for a, b in pairs
    )
