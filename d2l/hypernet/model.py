"""DocToLora: a frozen base that reads a document, the hypernetwork that makes a LoRA of it, and the base under that LoRA.

The base is held once: the encoder pass runs it unbound and without gradients, the question pass runs it with the
generated LoRA bound. Only the hypernetwork has parameters that train.

Shape legend: Tc = packed document tokens, T = packed question tokens, V = vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from d2l.base.masks import Masks, packed_masks
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch
from d2l.hypernet.encoder import ContextEncoder
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.lora import Lora, bind, checkpoint_contexts, merge_chunks
from d2l.hypernet.shape import HypernetShape
from d2l.hypernet.targets import find_targets, target_sizes


class DocToLora(nn.Module):
    """The whole model.

    Args:
        base: a causal language model, frozen.
        config: which LoRA to generate, and how.

    Raises:
        ModelError: a target module does not exist in every layer, or the base's layout is not known.
    """

    def __init__(self, base: PreTrainedModel, config: RunConfig) -> None:
        super().__init__()
        self.base = base
        self.targets = find_targets(base, config.target_modules)
        self.encoder = ContextEncoder(base, config.ctx_encoder_type, config.layer_idx)
        sizes = target_sizes(self.targets, base.config.hidden_size)
        self.hypernet = Hypernetwork(
            HypernetShape(
                config=config,
                modules=sizes,
                n_layers=len(self.encoder.layers),
                feature_size=self.encoder.feature_size,
            )
        )

    def attention_mask(self, position_ids: Tensor) -> Masks:
        """Make the masks that keep documents or questions of a packed row apart, from positions int64 `[1, T]`."""
        return packed_masks(self.base, position_ids)

    def features(self, batch: PackedBatch) -> Tensor:
        """Read all chunks into features `[1, layers, Tc, hidden]` or `[1, Tc, features]`, in the base's dtype; see
        `ContextEncoder`.
        """
        mask = self.attention_mask(batch.ctx_position_ids)
        return self.encoder(batch.ctx_ids, batch.ctx_position_ids, mask)

    def latents(self, batch: PackedBatch) -> Tensor:
        """Return the aggregator's output for every chunk, `[chunks, layers, modules, rank, latent]`."""
        features = self.features(batch)
        with self._hypernet_precision():
            return self.hypernet.aggregator(features, batch.chunks)

    def lora(self, batch: PackedBatch) -> Lora:
        """Make the merged LoRA of every context of a packed row: its chunks along the rank, then the learned bias."""
        return merge_chunks(self.chunk_loras(batch), batch.n_ctx_chunks, self.hypernet.bias())

    def chunk_loras(self, batch: PackedBatch) -> Lora:
        """Make the LoRA of every chunk of a packed row, without the bias: one entry per chunk."""
        features = self.features(batch)
        with self._hypernet_precision():
            chunks: Lora = self.hypernet(features, batch.chunks)
        return chunks

    def logits(self, batch: PackedBatch, lora: Lora | None, positions: Tensor | None = None) -> Tensor:
        """Compute the logits of the questions under their contexts' LoRAs, or of the base alone.

        Args:
            lora: one LoRA for each context of the row; `None` for the unbound base.
            positions: int64 `[N]`, where logits are wanted; default everywhere. The vocabulary of GPT-OSS is 201,088
                wide, and a few percent of tokens carry labels.

        Returns:
            `[N or T, V]`, in the base's dtype.
        """
        arguments: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": self.attention_mask(batch.position_ids),
            "use_cache": False,
            "logits_to_keep": 0 if positions is None else positions,
        }
        if lora is None:
            return self.base(**arguments).logits[0]
        with bind(self.targets, lora, batch.contexts):
            return self.base(**arguments).logits[0]

    def gradient_checkpointing_enable(self, kwargs: Mapping[str, Any]) -> None:
        """Recompute the base's layers in the backward pass, each under the LoRA that its forward was bound to.

        transformers checkpoints only modules in training mode, so the base is put into it; it is loaded without dropout.

        Args:
            kwargs: for `torch.utils.checkpoint.checkpoint`; `use_reentrant` and `preserve_rng_state` are off unless they
                are named.
        """
        # A base without dropout draws nothing: random states of CPU and GPU need not be kept for each layer.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **kwargs}
        if not options["use_reentrant"]:  # the reentrant kind takes no contexts
            options["context_fn"] = checkpoint_contexts
        checkpoint_layers(self.base, options)
        self.base.train()

    def _hypernet_precision(self) -> torch.autocast:
        """Use bfloat16 products for the float32 hypernetwork beside a bfloat16 base on a GPU; else float32.

        Not around the base: autocast makes sums float32 on CUDA, and so all that follows the first layer of experts.
        """
        wanted = self.base.device.type == "cuda" and self.base.dtype == torch.bfloat16
        return torch.autocast(self.base.device.type, dtype=torch.bfloat16, enabled=wanted)


def checkpoint_layers(base: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Switch the base's gradient checkpointing on, under the name that this release of transformers has for it."""
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=dict(kwargs))
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(kwargs))
