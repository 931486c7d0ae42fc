"""The decoder layers of a base model."""

from torch import nn
from transformers import PreTrainedModel

from d2l.errors import ModelError


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers: the outermost ModuleList with an entry for each of the config's `num_hidden_layers`.

    Raises:
        ModelError: there is none.
    """
    n_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(
        f"{type(base).__name__} has no list of {n_layers} decoder layers (num_hidden_layers of its config)"
    )
