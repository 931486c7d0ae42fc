"""Checkpoints without values: files whose headers say all, and whose bytes were never written.

A file system keeps no blocks for bytes that are only reserved, so that a checkpoint of 13 GB takes a page of the disk.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def write_hollow(file: Path, tensors: Mapping[str, Tensor], *, cut: int = 0) -> None:
    """Write a safetensors file of tensors of these shapes and dtypes; their values are zeros, and none is read.

    Args:
        tensors: may be on the meta device; float32, float16, bfloat16 or uint8.
        cut: so many bytes are missing at the end.

    Format: https://huggingface.co/docs/safetensors#format: the header's length in 8 bytes, little-endian, a JSON header, data.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end - cut)
