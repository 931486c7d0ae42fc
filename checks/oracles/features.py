"""What a context encoder must give of one chunk alone, from the hidden states that transformers itself returns.

Sources: `ctx_encoder_type` of SakanaAI/doc-to-lora@baa85db. Its per-layer activations are the embeddings and the outputs
of the layers 0 ... L - 2, the last of them after the final norm; an early exit is normed too. `concat_layers` is d2l's own
(CONFIG.md): the same layers side by side without the final norm, each at unit root mean square.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def layer_inputs(base: Any, ids: Sequence[int]) -> list[Tensor]:
    """Return what each layer reads of one chunk of S tokens: the embeddings, then outputs of layers 0 ... L - 2; [S, H] each.

    Args:
        base: a causal language model of transformers, untouched.
        ids: S token ids.
    """
    decoder = base.get_decoder()
    seen = decoder(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False).hidden_states
    return [state[0] for state in seen[: len(decoder.layers)]]


@torch.no_grad()
def of_chunk(base: Any, inputs: Sequence[Tensor], encoder_type: str, layer_idx: int | None = None) -> Tensor:
    """Return the features of one chunk of S tokens: [L, S, H] for `per_layer_activations`, else [S, F].

    Args:
        base: a causal language model of transformers, untouched.
        inputs: `layer_inputs` of the chunk.
        encoder_type: `per_layer_activations`, `early_exit`, `embed_only` or `concat_layers`.
        layer_idx: the layer whose input is the early exit; default a quarter of the layers, rounded down.
    """
    norm = base.get_decoder().norm
    match encoder_type:
        case "embed_only":
            return inputs[0]
        case "early_exit":
            return norm(inputs[len(inputs) // 4 if layer_idx is None else layer_idx])
        case "per_layer_activations":
            return torch.stack([*inputs[:-1], norm(inputs[-1])])
        case "concat_layers":
            return torch.cat([_unit(x) for x in inputs], dim=-1)
    raise ValueError(f"there is no ctx_encoder_type {encoder_type!r}")


def _unit(x: Tensor) -> Tensor:
    """Divide every token's vector by its root mean square."""
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()
