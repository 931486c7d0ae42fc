"""MXFP4 to bfloat16 in one Triton kernel, by integer arithmetic on the bits; `d2l.base.mxfp4` says when it is used.

Under a scale byte s, the magnitude of an E2M1 code m (its three lower bits: two of exponent, one of mantissa) has, as a
bfloat16, the bits (s - 1) * 128 + m * 64: exponent and mantissa stand where they belong, one field above s - 1. Below
m = 2, where E2M1 is subnormal, they are (s - 1) * 128 for m = 1, and 0. Where bfloat16 is subnormal itself the small codes
are multiples of its smallest: of 64 under s = 1, and of 32 up to m = 3 under s = 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 16  # of a block of 32 codes
_TILE = 128  # blocks of one program: one for each thread of four warps


# One compiled variant for all shapes: what was compared with the table once is what runs later. Nothing in a kernel has a
# type that a checker knows.
@triton.jit(
    do_not_specialize=["count", "groups", "middle", "inner", "outer_step", "middle_step", "inner_step"],
    do_not_specialize_on_alignment=["scales"],
)
def _decode(  # type: ignore[no-untyped-def]
    blocks, scales, words, count, groups, middle, inner, outer_step, middle_step, inner_step, TILE: tl.constexpr
):
    """Decode `count` blocks that lie as [outer, middle, inner, groups] with these steps, in blocks, before the last."""
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = number < count
    row = number // groups
    place = (row // (middle * inner)).to(tl.int64) * outer_step + (row // inner % middle) * middle_step
    place += (row % inner) * inner_step + number % groups
    scale = tl.load(scales + place, mask=inside, other=0).to(tl.int32)[:, None]
    base = (scale - 1) * 128
    small = tl.where(scale > 1, base, 32 << scale)  # the bits of code 1
    cut = tl.where(scale > 0, 1, 3)  # the largest code that is a multiple of it
    byte = tl.arange(0, 16)[None, :]
    pair = tl.load(blocks + (place * 16)[:, None] + byte, mask=inside[:, None], other=0).to(tl.int32)
    even, odd = pair & 7, (pair >> 4) & 7
    low = tl.where(even > cut, base + even * 64, small * even) | ((pair & 8) << 12)
    high = tl.where(odd > cut, base + odd * 64, small * odd) | ((pair & 128) << 8)
    tl.store(words + (number.to(tl.int64) * 16)[:, None] + byte, low | (high << 16), mask=inside[:, None])


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode blocks [..., groups, 16] and scales [..., groups], uint8, to bfloat16 [..., groups * 32].

    A view with up to three leading dimensions is read where it lies.

    Raises:
        Exception: of any kind, where Triton cannot compile or launch the kernel.
    """
    *shape, groups = scales.shape
    steps: tuple[int, ...] = scales.stride()
    lengths: tuple[int, ...]
    if len(shape) > 3 or steps[-1] != 1 or blocks.stride() != (*(step * _BYTES for step in steps), 1):
        blocks, scales = blocks.contiguous(), scales.contiguous()
        lengths, steps = (1, scales.numel() // groups), (0, 0, groups)
    else:
        missing = 3 - len(shape)
        lengths, steps = (*[1] * missing, *shape)[1:], (*[0] * missing, *steps[:-1])
    decoded = torch.empty(*shape, groups * 2 * _BYTES, dtype=torch.bfloat16, device=blocks.device)
    count = scales.numel()
    with torch.cuda.device_of(blocks):
        _decode[triton.cdiv(count, _TILE),](
            blocks, scales, decoded.view(torch.int32), count, groups, *lengths, *steps, TILE=_TILE
        )
    return decoded
