"""Weights that need no file: every value follows from the parameter's name and a seed.

Source: the fill rule of the stored numbers of the reference implementation (`reference.json`): a hash of name, seed and
place (the finalizer of lowbias32, https://github.com/skeeto/hash-prospector) as a number in [-1, 1).
"""

import zlib
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # 32 bits


def fill(name: str, seed: int, shape: Sequence[int], scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Return the values of a parameter, float32: `u * scale + offset` with u in [-1, 1).

    Args:
        name: the parameter's whole name.
        seed: of the model.
    """
    start = zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & _LOW)
    x = (torch.arange(prod(shape), dtype=torch.int64) * 2654435761 + start) & _LOW
    x ^= x >> 16
    x = _times(x, 0x7FEB352D)
    x ^= x >> 15
    x = _times(x, 0x846CA68B)
    x ^= x >> 16
    unit = ((x >> 8).double() * 2.0**-23 - 1).float()
    return (unit * scale + offset).reshape(tuple(shape))


def _times(x: Tensor, factor: int) -> Tensor:
    """Multiply modulo 2^32; the halves of the factor one by one, so that no product leaves 63 bits."""
    high, low = factor >> 16, factor & 0xFFFF
    return ((((x * high) & _LOW) << 16) + x * low) & _LOW


def filled(rules: Mapping[str, Mapping[str, object]], seed: int, prefix: str = "") -> dict[str, Tensor]:
    """Return all parameters of a model by name, float32.

    Args:
        rules: name -> `shape`, `scale` and `offset`; names begin with the prefix, under which they are filled.
        prefix: left out of the names that are returned.
    """
    return {name.removeprefix(prefix): fill(name, seed, **rule) for name, rule in rules.items()}  # type: ignore[arg-type]
