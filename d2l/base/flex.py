"""`packed_flex`: attention over a packed row in memory linear in its length, by PyTorch's `flex_attention`.

With sinks, sliding windows and soft caps. transformers' own `flex_attention` compiles one graph for each kind of mask,
most of a first step's two minutes, runs uncompiled after eight, and rounds the log-sum-exp before the sinks are applied
to it. Here one rule masks every layer (`d2l.base.blocks`), and a run compiles two graphs: with gradients and without.

Shape legend: H = query heads, K = key heads, T = tokens of the row, P = T padded to whole blocks, D = head size.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

PACKED_FLEX = "packed_flex"
SMALLEST_HEAD = 16  # of the kernels of flex_attention


def packed_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over a packed row; an attention function of transformers.

    On CUDA compiled kernels compute; elsewhere the same formula does, with all T² scores.

    Args:
        module: the attention layer, whose family's eager function takes masks of other kinds.
        query: [1, H, T, D]; key, value: [1, K, T, D].
        attention_mask: a mask of `d2l.base.blocks`, windows included; anything else is what the eager function takes.
        scaling: of the scores; softcap: bound on the scaled scores.
        s_aux: [H], the sinks: scores of a key without a value.
        options: what else the family hands its attention functions.

    Returns:
        [1, T, H, D]; and the weights where the eager function ran, else None.
    """
    if not isinstance(attention_mask, BlockMask):
        eager = sys.modules[type(module).__module__].eager_attention_forward  # every family of transformers has its own
        named = {"scaling": scaling} | ({} if softcap is None else {"softcap": softcap})
        return eager(module, query, key, value, attention_mask, **named, **options)
    assert not options.get("dropout"), "the base is loaded without dropout"
    attend = _by_kernels if query.is_cuda else _by_formula
    return attend(query, key, value, attention_mask, s_aux, scaling, softcap), None


def kernel_obstacle(head_size: int, capability: tuple[int, int] | None = None) -> str | None:
    """Say why the kernels of `flex_attention` cannot run on CUDA; None where they can.

    Args:
        capability: compute capability of a card that is not here, and taken to have Triton; by default of the one here.
    """
    if head_size < SMALLEST_HEAD:
        return f"its kernels take heads of {SMALLEST_HEAD} and more, found {head_size}"
    if capability is None and find_spec("triton") is None:
        return "its kernels need Triton, which is not installed"
    if capability is None and not any(map(which, [os.environ.get("CC", ""), "gcc", "clang"])):
        return "its kernels need a C compiler, and neither gcc nor clang is installed"
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    if capability is not None and capability < (8, 0):
        return f"its kernels are for SM 80 and later, found SM {capability[0]}{capability[1]}"
    return None


def _by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute what the kernels compute, in plain PyTorch and with all scores: where they do not run, and as their oracle."""
    precise = torch.promote_types(query.dtype, torch.float32)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1).to(precise) for x in (key, value))
    scores = query.to(precise) @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(query.shape[2], device=query.device)
    scores = scores.masked_fill(~mask.mask_mod(places, places, places[:, None], places), -torch.inf)
    lse = scores.logsumexp(-1)
    return _finished((scores - lse[..., None]).exp() @ value, lse, sinks, query.dtype)


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute by compiled kernels, in the same two graphs for all layers, documents and lengths.

    Raises:
        FailOnRecompileLimitHit: too many graphs in this process. Running on would materialise all scores.
    """
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks))
    rows = [_padded(x, mask.shape[-1]) for x in (query, key, value)]
    if trains:  # the keys of the first layer need no gradient: one graph for it too
        rows = [x if x.requires_grad else x.detach().requires_grad_() for x in rows]
    for row in rows:
        torch._dynamo.maybe_mark_dynamic(row, 2)
    # autocast belongs to what a graph is compiled for: under a caller's own there would be two more graphs
    plain = torch.autocast(query.device.type, dtype=torch.bfloat16, enabled=False)
    with torch.set_grad_enabled(trains), plain:
        output: Tensor = _compiled()(*rows, mask, sinks, scale, softcap)
    return output[:, : query.shape[2]]


@cache
def _compiled() -> Any:
    # No size is dynamic but those marked, so none is taken for another that happens to be equal. fullgraph: an error
    # instead of running uncompiled where dynamo would give up.
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute attention over a row of whole blocks; this is what is compiled."""
    length = query.shape[2]
    assert key.shape[2] == value.shape[2] == length  # the compiler knows one length then, and not three
    blocks = BlockMask(  # made anew: the length that the mask itself carries would be a constant of the graph
        seq_lengths=(length, length),
        kv_num_blocks=mask.kv_num_blocks,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_num_blocks,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_num_blocks,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_num_blocks,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
    )
    output, auxiliary = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped_at(softcap),
        block_mask=blocks,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert auxiliary.lse is not None
    return _finished(output, auxiliary.lse, sinks, query.dtype)


def _capped_at(bound: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bound * torch.tanh(score / bound)

    return capped


def _finished(output: Tensor, lse: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Let sinks take their share of the softmax: exp(lse) / (exp(lse) + exp(sink)) of the attention is left without them.

    Args:
        output: [1, H, T, D]; lse: [1, H, T], log-sum-exp of the scores, in float32 or float64.

    Returns:
        [1, T, H, D] in dtype; the product is computed in the precision of lse.
    """
    if sinks is not None:
        output = output * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return output.to(dtype).transpose(1, 2).contiguous()


def _padded(x: Tensor, length: int) -> Tensor:
    """Pad [1, H, T, D] with zeros to P tokens; a token's heads lie together, as a projection leaves them, in any case."""
    by_token = x.transpose(1, 2)
    missing = length - by_token.shape[1]
    return (pad(by_token, (0, 0, 0, 0, 0, missing)) if missing else by_token.contiguous()).transpose(1, 2)


AttentionInterface.register(PACKED_FLEX, packed_flex_attention)
AttentionMaskInterface.register(PACKED_FLEX, eager_mask)  # for rows that no block mask was made for
