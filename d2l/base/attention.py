"""`per_document`: the model's own eager attention, one document of a packed row at a time.

Eager attention over a packed row of T tokens fills T² scores, although a token only ever sees its own document. Here the
documents are laid side by side, those of similar length together, so that a document of t tokens fills at most 4·t²
scores: the same function, sinks and soft caps included, because the model's own eager forward computes it.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

PER_DOCUMENT = "per_document"
FLASH_4 = (
    "flash_attention_4"  # of transformers: on CUDA only, in bfloat16 only, and judged by the checks like any other
)


def per_document_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention within each document of a packed row; an attention function of transformers.

    Args:
        module: the attention layer; the eager function of its family computes.
        query: [1, heads, T, head size]; key, value: [1, key heads, T, head size].
        attention_mask: int64 [1, 1, n, S], the documents' `Segments.grid`; anything else is what the eager function
            takes.
        options: what the family hands its attention functions, among it the `sliding_window` of the layer.

    Returns:
        [1, T, heads, head size]; and the weights where the eager function ran on the row as it is, else None.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward  # every family of transformers has its own
    if attention_mask is None or attention_mask.is_floating_point():
        return eager(module, query, key, value, attention_mask, **options)
    outputs, places = [], []
    for grid in _of_similar_length(attention_mask[0, 0]):
        held = grid >= 0
        padded = grid.clamp(min=0)
        side_by_side = [x[0][:, padded].transpose(0, 1) for x in (query, key, value)]
        mask = _causal(grid.shape[1], options.get("sliding_window"), query)
        output, _ = eager(module, *side_by_side, mask, **options)
        outputs.append(output[held])
        places.append(grid[held])
    if len(outputs) == 1:  # the documents in order, as they lay in the row
        return outputs[0][None], None
    return torch.cat(outputs)[torch.cat(places).argsort()][None], None


def _of_similar_length(grid: Tensor) -> list[Tensor]:
    """Group the rows [n, S] of a grid, so that none has less than half the width of its group."""
    lengths = (grid >= 0).sum(1)
    doublings = lengths.log2().ceil()
    groups = [(grid[doublings == size], int(lengths[doublings == size].max())) for size in doublings.unique()]
    return [rows[:, :width] for rows, width in groups]


def _causal(length: int, window: int | None, like: Tensor) -> Tensor:
    """Make the mask [1, 1, t, t] to add to scores, so that a token sees itself and those less than `window` before it."""
    steps = torch.arange(length, device=like.device)
    distance = steps[:, None] - steps
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill(
        hidden, torch.finfo(like.dtype).min
    )[None, None]


AttentionInterface.register(PER_DOCUMENT, per_document_attention)
AttentionMaskInterface.register(PER_DOCUMENT, eager_mask)  # for rows that no grid was made for
