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
def of_chunk(base: Any, ids: Sequence[int], encoder_type: str, layer_idx: int | None = None) -> Tensor:
    """Return the features of one chunk of S tokens: [L, S, H] for `per_layer_activations`, else [S, F].

    Args:
        base: a causal language model of transformers, untouched.
        ids: S token ids.
        encoder_type: `per_layer_activations`, `early_exit`, `embed_only` or `concat_layers`.
        layer_idx: the layer whose input is the early exit; default a quarter of the layers, rounded down.
    """
    decoder = base.get_decoder()
    seen = decoder(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False).hidden_states
    layers = len(decoder.layers)
    inputs = [state[0] for state in seen[:layers]]  # what each layer reads: the embeddings, then outputs of 0 ... L - 2
    match encoder_type:
        case "embed_only":
            return inputs[0]
        case "early_exit":
            return decoder.norm(inputs[layers // 4 if layer_idx is None else layer_idx])
        case "per_layer_activations":
            return torch.stack([*inputs[:-1], decoder.norm(inputs[-1])])
        case "concat_layers":
            return torch.cat([_unit(x) for x in inputs], dim=-1)
    raise ValueError(f"there is no ctx_encoder_type {encoder_type!r}")


def _unit(x: Tensor) -> Tensor:
    """Divide every token's vector by its root mean square."""
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()
