"""The MXFP4 codec against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2l.base.mxfp4 import dequantize, quantize

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def decode_by_hand(blocks: torch.Tensor, scales: torch.Tensor) -> list[float]:
    """One row: blocks [groups, 16], scales [groups]."""
    values = []
    for block, scale in zip(blocks.tolist(), scales.tolist(), strict=True):
        for byte in block:
            values += [E2M1[byte % 16] * 2.0 ** (scale - 127), E2M1[byte // 16] * 2.0 ** (scale - 127)]
    return values


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 255), min_size=48, max_size=48), st.lists(st.integers(0, 252), min_size=3, max_size=3))
def test_every_byte_decodes_exactly(block_bytes: list[int], scale_bytes: list[int]) -> None:
    blocks = torch.tensor(block_bytes, dtype=torch.uint8).view(3, 16)
    scales = torch.tensor(scale_bytes, dtype=torch.uint8)
    expected = torch.tensor(decode_by_hand(blocks, scales), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        decoded = dequantize(blocks, scales, dtype)
        assert decoded.dtype == dtype
        assert torch.equal(decoded.double(), expected)
        assert torch.equal(decoded.signbit(), expected.signbit())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32))
def test_quantize_takes_the_nearest_value_of_the_scale(weights: list[float]) -> None:
    blocks, scales = quantize(torch.tensor(weights))
    largest = max(map(abs, weights))
    if largest > 2.0**-120:
        assert scales.item() - 127 == math.floor(math.log2(largest)) - 2
    unit = 2.0 ** (scales.item() - 127)
    for weight, decoded in zip(weights, dequantize(blocks, scales, torch.float64).tolist(), strict=True):
        nearest = min(abs(weight - value * unit) for value in E2M1)
        assert abs(weight - decoded) == pytest.approx(nearest, rel=1e-6)


def test_ties_go_to_the_even_code() -> None:
    """Midpoints of the eight magnitudes; the 6 fixes the scale at 1."""
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([6.0, *midpoints, *(-value for value in midpoints), *[0.0] * 17])
    decoded = dequantize(*quantize(row), torch.float32)[1:15].tolist()
    evens = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert decoded == [*evens, *(-value for value in evens)]


def test_what_mxfp4_can_hold_survives_the_round_trip() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (5, 3, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(20, 230, (5, 3, 4), generator=generator, dtype=torch.uint8)
    weights = dequantize(blocks, scales, torch.float32)
    assert torch.equal(dequantize(*quantize(weights), torch.float32), weights)
