"""MXFP4 bytes to numbers.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3: 32 elements of 4 bits, E2M1 (sign, two bits of
exponent of bias 1, one of mantissa), share a scale of 8 bits, E8M0 (a power of two, bias 127, 255 is NaN). Layout of the
official gpt-oss checkpoints: two elements to a byte, the first in the low nibble.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers that blocks and their scales stand for, float64 [..., n * 32].

    Args:
        blocks: uint8 [..., n, 16].
        scales: uint8 [..., n].
    """
    table = torch.tensor(E2M1, dtype=torch.float64)
    first, second = table[(blocks % 16).long()], table[(blocks // 16).long()]
    elements = torch.stack([first, second], dim=-1).flatten(-2)  # [..., n, 32]
    factors = torch.pow(2.0, scales.double() - E8M0_BIAS)
    return (elements * factors[..., None]).flatten(-2)
