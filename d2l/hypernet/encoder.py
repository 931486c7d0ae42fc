"""The context encoder: the frozen base's own layers read a document and give its features, without a second copy.

Shape legend: T = packed document tokens, L = decoder layers, H = hidden size.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from d2l.base.masks import Masks
from d2l.base.sharding import as_forward, is_sharded
from d2l.errors import ModelError

EncoderType = Literal["embed_only", "per_layer_activations", "early_exit", "concat_layers"]


class ContextEncoder:
    """Reader of packed documents, whose features are inputs of the base's decoder layers.

    * `per_layer_activations`: the inputs of all L layers, `[1, L, T, H]`; the last of them after the final norm.
    * `early_exit`: the input of layer `layer_idx`, after the final norm, `[1, T, H]`.
    * `embed_only`: the input of the first layer, `[1, T, H]`.
    * `concat_layers`: the inputs of all L layers side by side, each at unit root mean square, `[1, T, L·H]`: one set of
      features for all layers, early binding and late meaning in it (the reference has no such type).

    Args:
        base: a causal language model whose decoder has `layers` and a final `norm`.
        encoder_type: which features.
        layer_idx: where the early exit is; default a quarter of the layers.

    Raises:
        ModelError: the decoder is built otherwise, or `layer_idx` lies outside.
    """

    def __init__(self, base: PreTrainedModel, encoder_type: EncoderType, layer_idx: int | None = None) -> None:
        self.decoder = base.get_decoder()
        layers, norm = getattr(self.decoder, "layers", None), getattr(self.decoder, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise ModelError(
                f"{type(base).__name__}: expected a decoder with `layers` and `norm`, found {type(self.decoder).__name__} "
                "without them; choose a causal language model of a supported family (README, Base models)"
            )
        exit_at = len(layers) // 4 if layer_idx is None else layer_idx
        if exit_at >= len(layers):
            raise ModelError(
                f"layer_idx: expected less than the model's {len(layers)} layers, found {exit_at}; lower it"
            )
        self.encoder_type = encoder_type
        self.layers, self.norm = layers, norm
        self.feature_size: int = base.config.hidden_size * (len(layers) if encoder_type == "concat_layers" else 1)
        last = {"early_exit": exit_at, "embed_only": 0}
        self.last = last.get(encoder_type, len(layers) - 1)
        # kept for a sharded base alone: a bound method of its own is a circle, and keeps a dropped model's memory
        self._sharded_read = as_forward(base, self._read_documents) if is_sharded(base) else None

    @property
    def per_layer(self) -> bool:
        """Whether every decoder layer has features of its own."""
        return self.encoder_type == "per_layer_activations"

    @torch.no_grad()
    def __call__(self, ids: Tensor, position_ids: Tensor, attention_mask: Masks) -> Tensor:
        """Read packed documents into features; the layers from the last one wanted on are not run.

        Args:
            ids: token ids, int64 `[1, T]`.
            position_ids: int64 `[1, T]`, restarting at 0 where a document (or chunk of one) starts.
            attention_mask: what keeps the documents apart (`d2l.base.masks.packed_masks`).
        """
        return (self._sharded_read or self._read_documents)(ids, position_ids, attention_mask)

    def _read_documents(self, ids: Tensor, position_ids: Tensor, attention_mask: Masks) -> Tensor:
        """Run the decoder up to the last layer wanted."""
        features: Tensor | None = None

        def watch(index: int, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            nonlocal features
            features = self._written(features, index, arguments[0] if arguments else named["hidden_states"])
            if index == self.last:
                raise _Seen

        hooks = [  # before all others: nothing begins in the layer that is not run, such as gathering its weights
            self.layers[index].register_forward_pre_hook(partial(watch, index), with_kwargs=True, prepend=True)
            for index in range(0 if self._reads_all else self.last, self.last + 1)
        ]
        try:
            self.decoder(input_ids=ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
        except _Seen:
            assert features is not None
            return features
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError("the decoder ran past its layers without calling the last one wanted")

    @property
    def _reads_all(self) -> bool:
        return self.per_layer or self.encoder_type == "concat_layers"

    def _written(self, features: Tensor | None, layer: int, x: Tensor) -> Tensor:
        """Write a layer's input `[1, T, H]` where it belongs in the features, which the first one makes room for.

        Collected and then put together, features of all layers would be held twice: at 32,768 tokens 9 GB, not 4.5.
        """
        if self.per_layer:
            features = x.new_empty(1, len(self.layers), *x.shape[1:]) if features is None else features
            features[:, layer] = self.norm(x) if layer == self.last else x
        elif (
            self.encoder_type == "concat_layers"
        ):  # the residual stream grows with depth: no layer should drown the rest
            features = x.new_empty(*x.shape[:-1], self.feature_size) if features is None else features
            features.unflatten(-1, (len(self.layers), -1))[:, :, layer] = functional.rms_norm(x, x.shape[-1:])
        else:
            features = x if self.encoder_type == "embed_only" else self.norm(x)
        return features


class _Seen(Exception):
    """Raised to leave the decoder's forward once every wanted input was seen."""
