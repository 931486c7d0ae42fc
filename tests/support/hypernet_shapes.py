"""Shapes of small hypernetworks, from the sizes of a base and keys of the configuration."""

from collections.abc import Mapping
from typing import Any

from d2l.config.schema import RunConfig
from d2l.hypernet.shape import HypernetShape


def hypernet_shape(
    modules: Mapping[str, tuple[int, int]], *, n_layers: int, feature_size: int, per_layer: bool = True, **values: Any
) -> HypernetShape:
    """The shape for target modules of these (d_in, d_out); `values` are keys of the configuration.

    Args:
        per_layer: features of every layer, or one set for all.
    """
    encoder = "per_layer_activations" if per_layer else "early_exit"
    config = RunConfig(**{"target_modules": tuple(modules), "ctx_encoder_type": encoder, **values})
    return HypernetShape(config=config, modules=modules, n_layers=n_layers, feature_size=feature_size)
