"""Attention masks that keep packed documents apart, one for each kind of layer that the model has.

GPT-OSS ignores `position_ids` in the masks that it makes itself, so that packed documents see each other
(transformers#39997), and one 4D mask for all its layers would drop the sliding window.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from d2l.base.attention import PER_DOCUMENT
from d2l.base.blocks import block_mask, first_visible
from d2l.base.flex import PACKED_FLEX
from d2l.base.segments import Segments
from d2l.errors import ModelError

_BUILDERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}

Mask = Tensor | BlockMask | None
Masks = Mask | dict[str, Mask]


@dataclass(frozen=True)
class AttentionLayout:
    """Range of every layer's attention: `full_attention` all tokens so far, `sliding_attention` the last `window`."""

    layer_types: tuple[str, ...]
    window: int | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distinct layer types, in order of first appearance."""
        return tuple(dict.fromkeys(self.layer_types))


def causal_lm_class(base_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that holds this model.

    Raises:
        ModelError: there is none.
    """
    if not _is_of_text_alone(base_config):
        raise ModelError(
            f"{base_config.model_type} is a multimodal model; d2l needs a causal language model of its own. "
            f"Use a text-only checkpoint of the same family."
        )
    if type(base_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{base_config.model_type} is not a causal language model that transformers ships")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(base_config)]
    return model_class


def _is_of_text_alone(base_config: PreTrainedConfig) -> bool:
    if any(name.startswith(("vision", "audio")) for name in base_config.sub_configs):
        return False
    try:
        return bool(base_config.get_text_config() is base_config)
    except ValueError:  # several of its parts read text
        return False


def attention_layout(base_config: PreTrainedConfig) -> AttentionLayout:
    """Read the layout off a model's config.

    Raises:
        ModelError: documents packed into one row cannot be kept apart in this model, and why.
    """
    model_class = causal_lm_class(base_config)
    window = getattr(base_config, "sliding_window", None)
    uniform = "full_attention" if window is None else "sliding_attention"
    depth = getattr(base_config, "num_hidden_layers", None)
    layer_types = getattr(base_config, "layer_types", None) or [uniform] * (depth or 0)
    obstacle = None
    if depth is None:
        obstacle = "has no single stack of num_hidden_layers"
    elif unknown := sorted(set(layer_types) - set(_BUILDERS)):
        obstacle = f"has layers of type {', '.join(unknown)}, whose state or pattern a mask cannot separate"
    elif not hasattr(base_config, "num_attention_heads"):
        obstacle = "has no attention to mask"
    elif not getattr(base_config, "is_causal", True) or getattr(base_config, "use_bidirectional_attention", False):
        obstacle = "attends to later tokens"
    elif "position_ids" not in inspect.signature(model_class.forward).parameters:
        obstacle = "takes no position_ids, so positions cannot restart with each document"
    elif "sliding_attention" in layer_types and window is None:
        obstacle = "has sliding_attention layers and no sliding_window"
    if obstacle:
        raise ModelError(
            f"documents cannot be packed for model_type {base_config.model_type}: it {obstacle}. "
            f"Supported: causal models with layers of type {' and '.join(_BUILDERS)} only, such as gpt_oss, llama, "
            f"qwen3, mistral and gemma2."
        )
    return AttentionLayout(tuple(layer_types), window)


def packed_masks(base: PreTrainedModel, position_ids: Tensor) -> Masks:
    """Make the `attention_mask` for a row of packed documents, to be passed with `position_ids` and `use_cache=False`.

    A token sees another one if that one belongs to the same document, is not later, and, in sliding layers, is less
    than the window away.

    Args:
        base: its config tells the layers and the attention implementation, and with that the form of a mask.
        position_ids: int64 [1, T]; where a document begins, see `segment_starts`.

    Returns:
        One mask where all layers are alike, else one for each layer type. Under eager [1, 1, T, T] in the base's dtype,
        to be added to the scores; under sdpa bool, or None where plain causal attention is right; under per_document
        int64 [1, 1, n, S], the documents' `Segments.grid`; under packed_flex a block mask (`d2l.base.blocks`).
    """
    layout = attention_layout(base.config)
    if base.config._attn_implementation == PER_DOCUMENT:
        grid = Segments.from_position_ids(position_ids).grid(position_ids.device)[None, None]
        return dict.fromkeys(layout.kinds, grid) if len(layout.kinds) > 1 else grid
    make = _block_mask if base.config._attn_implementation == PACKED_FLEX else _dense_mask
    masks = {kind: make(base, kind, position_ids) for kind in layout.kinds}
    return masks if len(masks) > 1 else masks[layout.kinds[0]]


def _dense_mask(base: PreTrainedModel, kind: str, position_ids: Tensor) -> Mask:
    """Make one mask as transformers makes it."""
    embeddings = position_ids.new_empty((*position_ids.shape, 0), dtype=base.dtype)  # read for shape, dtype and device
    # no mask and no cache: the condition under which transformers looks for packed documents
    mask: Any = _BUILDERS[kind](
        base.config,
        embeddings,
        None,  # the attention mask
        None,  # the cache, by position: `past_key_values` before transformers 5.24, `cache` from then on
        position_ids=position_ids,
    )
    return mask


def _block_mask(base: PreTrainedModel, kind: str, position_ids: Tensor) -> Mask:
    """Make one mask for `packed_flex`."""
    window = base.config.sliding_window if kind == "sliding_attention" else None
    return block_mask(first_visible(position_ids, window))
