"""What each token of a packed row sees first, and the block mask of `flex_attention` that follows from it.

A token sees all from a first place up to itself: from the beginning of its document, or from where its window begins.
So one rule holds for every kind of layer and any number of documents, and `flex_attention` compiles one kernel for all.

Shape legend: T = tokens of the row, P = T padded to whole blocks, n = P / 128 blocks.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from d2l.base.segments import segment_starts

BLOCK = 128  # tokens; the block size that flex_attention's kernels are made for
_FEWEST_BLOCKS = 2  # rows of fewer than 128 queries get another kernel, and a size of 1 is never dynamic


def first_visible(position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return the first place in the row that each token sees.

    Args:
        position_ids: int64 [1, T]; where a document begins, see `segment_starts`.
        window: tokens that a token sees, itself included; all of its document by default.

    Returns:
        int32 [T] on the same device, without waiting for it; never falling along the row.
    """
    places = torch.arange(position_ids.shape[1], dtype=torch.int32, device=position_ids.device)
    first = torch.where(segment_starts(position_ids), places, 0).cummax(0).values
    return first if window is None else torch.maximum(first, places - window + 1)


def block_mask(first: Tensor) -> BlockMask:
    """Make the block mask in which a token sees from its first visible place up to itself.

    Padding after the row's end sees itself only, and no token of the row sees it. Nothing is compiled, and nothing waits
    for the device.

    Args:
        first: int32 [T], never falling; see `first_visible`.

    Returns:
        A mask of shape [1, 1, P, P], its index tables int32 [1, 1, n, n].
    """
    length = first.shape[0]
    n = max(_FEWEST_BLOCKS, -(-length // BLOCK))
    places = torch.arange(n * BLOCK, dtype=torch.int32, device=first.device)
    first = torch.where(places < length, pad(first, (0, n * BLOCK - length)), places)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    # `first` never falls: a block of queries sees, without a gap, from what its first query sees up to itself, and all
    # of its queries see whole what lies between the first place of its last one and the block itself.
    block = places[:n]
    partial = first[::BLOCK] // BLOCK
    full = torch.minimum((first[BLOCK - 1 :: BLOCK] + BLOCK - 1) // BLOCK, block)
    before, column = (full - partial)[:, None], block[None]
    partly = torch.where(
        column < before, partial[:, None] + column, block[:, None]
    )  # those before the full ones; itself
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks=(full - partial + 1)[None, None],
        kv_indices=partly[None, None],
        full_kv_num_blocks=(block - full)[None, None],
        full_kv_indices=torch.minimum(full[:, None] + column, block[:, None])[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
    )
    _mark_lengths(first, mask)
    return mask


def _mark_lengths(first: Tensor, mask: BlockMask) -> None:
    """Let compiled functions take any length of row: the sizes of these tensors that follow from it are no constants."""
    torch._dynamo.maybe_mark_dynamic(first, 0)
    for side in ("kv", "q", "full_kv", "full_q"):
        torch._dynamo.maybe_mark_dynamic(getattr(mask, f"{side}_num_blocks"), 2)
        torch._dynamo.maybe_mark_dynamic(getattr(mask, f"{side}_indices"), [2, 3])
