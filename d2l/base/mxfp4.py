"""The MXFP4 codec: bytes to weights, exactly, and weights to the nearest bytes.

Layout of the official checkpoints, per projection: `*_blocks` [experts, out, in / 32, 16] uint8, two 4-bit codes in a
byte with the even element in the low nibble; `*_scales` [experts, out, in / 32] uint8. A value is
E2M1[code] * 2^(scale - 127).
Source: OCP Microscaling Formats (MX) specification 1.0.

A table decodes on every device. On CUDA a Triton kernel makes bfloat16, six times as fast, once it has shown there that it
decodes as the table does.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from textwrap import shorten
from warnings import warn

import torch
from torch import Tensor

BLOCK = 32  # elements that share one scale
BITS_PER_WEIGHT = 4 + 8 / BLOCK
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 codes 0-7; codes 8-15 are their negatives
_LARGEST_EXPONENT = 2  # of an E2M1 element: 6 = 1.5 * 2^2
_BIAS = 127  # of a scale byte
SCALE_BYTES = 253  # 6 times the scale of a larger byte is above the largest bfloat16 and float32
_KERNEL_DEVICES = ("cuda",)
_WORDS = {torch.bfloat16: torch.int32, torch.float32: torch.int64, torch.float64: torch.complex128}  # two elements wide


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tabulate what a byte stands for [256], its two elements seen as one word, and the factor of a scale [256]; exact."""
    codes = torch.arange(256)
    elements = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=dtype)
    pairs = torch.stack([elements[codes & 0x0F], elements[codes >> 4]], dim=-1)
    factors = torch.ldexp(torch.ones(256, dtype=torch.float64), codes - _BIAS)
    return pairs.view(_WORDS[dtype]).squeeze(-1).to(device), factors.to(device, dtype)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode the bytes into the weights that they stand for, exactly.

    Args:
        blocks: [..., groups, 16] uint8; a strided view, such as of other rows or columns, is not copied on CUDA.
        scales: [..., groups] uint8.
        dtype: bfloat16, float32 or float64; each holds every MXFP4 value whose scale byte is below 253.

    Returns:
        [..., groups * 32] of `dtype`, contiguous.
    """
    assert blocks.shape[:-1] == scales.shape, f"blocks {tuple(blocks.shape)} do not fit scales {tuple(scales.shape)}"
    if dtype == torch.bfloat16 and blocks.device.type in _KERNEL_DEVICES and (kernel := _kernel(blocks.device)):
        return kernel(blocks, scales)
    return _look_up(blocks, scales, dtype)


def _look_up(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode by a table of what every byte stands for."""
    words, factors = _tables(dtype, blocks.device)
    elements = words.index_select(0, blocks.flatten().int()).view(dtype).view(*scales.shape, BLOCK)
    return elements.mul_(factors[scales.int()].unsqueeze(-1)).flatten(-2)


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the Triton kernel if it compiles there and decodes every byte under every scale as the table does on a CPU.

    Warns once where it does not.
    """
    scales = torch.arange(SCALE_BYTES, dtype=torch.uint8).unsqueeze(-1).expand(-1, 256 // (BLOCK // 2)).contiguous()
    blocks = torch.arange(256, dtype=torch.uint8).expand(SCALE_BYTES, -1).contiguous().view(*scales.shape, BLOCK // 2)
    expected = _look_up(blocks, scales, torch.bfloat16)
    try:
        from d2l.base.mxfp4_triton import decode

        decoded = decode(blocks.to(device), scales.to(device)).cpu()
    except Exception as error:  # Triton, the compiler and the driver raise what they like: each has the same remedy
        reason = shorten(f"{type(error).__name__}: {error}", width=300)
    else:
        if torch.equal(decoded.view(torch.int16), expected.view(torch.int16)):
            return decode
        reason = "it decodes bytes to other numbers than they stand for"
    warn(
        f"MXFP4 experts are decoded by a table on {device}, several times slower than by Triton: {reason}", stacklevel=2
    )
    return None


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Encode weights as the nearest MXFP4 bytes: ties go to the even code, and what exceeds 6 units of a block's scale saturates.

    Args:
        weights: [..., in] floating point and finite, `in` a multiple of 32; read in float32.

    Returns:
        blocks [..., in / 32, 16] uint8 and scales [..., in / 32] uint8.
    """
    assert weights.shape[-1] % BLOCK == 0, f"{weights.shape[-1]} weights in a row do not divide into blocks of {BLOCK}"
    groups = weights.float().unflatten(-1, (-1, BLOCK))
    magnitudes = groups.abs()
    exponents = torch.frexp(magnitudes.amax(-1)).exponent - 1 - _LARGEST_EXPONENT
    exponents = exponents.clamp(-_BIAS, _BIAS)
    magnitudes = torch.ldexp(magnitudes, -exponents.unsqueeze(-1))
    codes = groups.signbit().to(torch.uint8) << 3
    for code, (below, above) in enumerate(pairwise(_MAGNITUDES)):
        middle = (below + above) / 2
        codes += magnitudes >= middle if code % 2 else magnitudes > middle
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + _BIAS).to(torch.uint8)
