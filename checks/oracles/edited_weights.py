"""A base under one document's LoRA, without any binding: its weights are edited.

Source: LoRA (arXiv:2106.09685, section 4.1), W' = W + scale * B A in its notation; here A [R, d_in] and B [R, d_out] hold
a rank's values in rows, so W' = W + scale * B^T A. A block as target has the linear parallel adapter of He et al.
(arXiv:2110.04366, table 1) beside it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = "mlp"  # the name of a layer's whole MLP, which a LoRA can stand beside


def logits(
    base: Any, input_ids: Sequence[int], A: Mapping[str, Tensor], B: Mapping[str, Tensor], scale: float
) -> Tensor:
    """Return the logits [T, V] of one question alone under a LoRA, differentiable in A and B.

    The base reads the question without masks, positions or a cache of ours: all of them are the model library's own.

    Args:
        base: a causal language model of transformers, untouched.
        input_ids: T token ids.
        A, B: of one context, module name -> [L, R, d_in] and [L, R, d_out]; empty for the base alone.
        scale: factor of every delta.
    """
    names = {module: name for name, module in base.named_modules()}
    edited: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for number, layer in enumerate(base.get_decoder().layers):
            for target in A:
                a, b = A[target][number], B[target][number]
                if target == BLOCK:
                    hook = layer.mlp.register_forward_hook(partial(_add_beside, a, b, scale))
                    hooks.callback(hook.remove)
                else:
                    linear = _linear(layer, target)
                    edited[f"{names[linear]}.weight"] = linear.weight + scale * (b.T @ a)
        ids = torch.tensor([list(input_ids)])
        output = torch.func.functional_call(base, edited, kwargs={"input_ids": ids, "use_cache": False})
    return output.logits[0]


def sizes(base: Any, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of each target, from the first layer of a model of transformers."""
    layer, hidden = base.get_decoder().layers[0], base.config.hidden_size
    linears = {name: _linear(layer, name) for name in targets if name != BLOCK}
    found = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    return found | ({BLOCK: (hidden, hidden)} if BLOCK in targets else {})


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    """Find the layer's one Linear of that last name."""
    (found,) = (
        module
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[-1] == name
    )
    return found


def _add_beside(a: Tensor, b: Tensor, scale: float, block: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Add scale * (x A^T) B to a block's output, as a forward hook; its first value where it returns several."""
    delta = scale * (inputs[0] @ a.T) @ b
    return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta
