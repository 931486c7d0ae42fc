"""Checkpoints as the reference's trainer saves them, made without d2l: dataclasses of these names, PEFT's own, `torch.save`."""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

CLASSES = {
    "ctx_to_lora.configs": "CtxEncoderArguments",
    "ctx_to_lora.modeling.aggregator": "AggregatorConfig",
    "ctx_to_lora.modeling.hypernet": "HypernetConfig",
}


@dataclass(frozen=True)
class Reference:
    """Sizes of a hypernetwork; the defaults are those of the published main experiment, but for the base's sizes."""

    layers: int
    hidden: int
    modules: Mapping[str, tuple[int, int]]
    base: str = "some/base"
    rank: int = 8
    latent: int = 512
    queries: int = 8
    blocks: int = 9
    pre_head: int = 1

    def shapes(self) -> Shapes:
        """Every parameter, by the formulas of the golden README; per-layer features, `per_layer_processing`."""
        d, names = self.latent, sorted(self.modules)
        rows = max(sum(sizes) for sizes in self.modules.values())
        found: Shapes = {
            **_swiglu("aggregator.perceiver.modality_projection", self.hidden, d),
            **_resampler("aggregator.perceiver.encoder", self.queries, self.blocks, d),
            **_resampler("aggregator.perceiver.decoder", len(names) * self.rank, 1, d),
        }
        for block in range(self.pre_head):
            at = f"layers.{block}.layers"
            for place in (0, 4):
                found |= {f"{at}.{place}.weight": (d,), f"{at}.{place}.bias": (d,)}
            for place, (i, o) in {1: (d, 4 * d), 3: (4 * d, d)}.items():
                found |= {
                    f"{at}.{place}.weight": (self.layers, i, o),
                    f"{at}.{place}.bias": (1, self.layers, 1, 1, o),
                }
        for kind in ("bias_A", "bias_B", "scaler_A", "scaler_B"):
            for name in names:
                size = self.modules[name]["AB".index(kind[-1])]
                found[f"{kind}.{name}"] = (
                    (self.layers, self.rank, size) if kind.startswith("bias") else (1, self.layers, self.rank, 1)
                )
        found["head.weight"] = (self.layers, *([len(names)] if len(names) > 1 else []), d, rows)
        return found

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in self.shapes().items()}

    def tensors_of_no_size(self) -> dict[str, Tensor]:
        """Every parameter in its shape, all over a storage of one number: the file has names and shapes alone."""
        return {name: torch.zeros(1).expand(shape) for name, shape in self.shapes().items()}

    def save(self, path: Path, tensors: Mapping[str, Any], **changes: Any) -> Path:
        """Write the file.

        Args:
            changes: fields that differ, by name; `...` leaves one out, as in a file older than it.
        """
        names = sorted(self.modules)
        hypernet = {
            **{"latent_size": self.latent, "use_light_weight_lora": False, "light_weight_latent_size": 128},
            **{"per_rank_gen": True, "use_per_rank_bias": False, "use_bias": True, "per_layer_processing": True},
            **{"use_token_mixing": False, "num_pre_head_layers": self.pre_head, "dropout_rate": 0.0},
            **{"extra_modules": None, "base_hidden_size": self.hidden, "layer_indices": torch.arange(self.layers)},
            "feature_sizes": tuple({name: self.modules[name][side] for name in names} for side in (0, 1)),
            "lora_config": LoraConfig(
                r=self.rank,
                lora_alpha=2 * self.rank**1.5,
                target_modules=names,
                task_type="CAUSAL_LM",
                base_model_name_or_path=self.base,
            ),
        }
        aggregator = {
            **{"aggregator_type": "perceiver", "num_layers": self.layers, "num_modules": len(names)},
            **{"num_extra_modules": 0, "output_size": self.latent, "feature_size": self.hidden, "pooling_type": "mean"},
            **{"num_latent_factor": 8, "lora_r": self.rank, "per_rank_gen": True, "n_latent_queries": self.queries},
            **{"num_blocks": self.blocks, "num_self_attn_per_block": 0, "shared_weights": False},
            "layer_to_layer_ctx_encoder": True,
        }
        encoder = {
            **{"ctx_encoder_model_name_or_path": None, "ctx_encoder_type": "per_layer_activations"},
            **{"layer_idx": self.layers // 4, "quantize_ctx_encoder": False, "ctx_encoder_last_layer": None},
        }
        with _classes() as (encoder_class, aggregator_class, hypernet_class):
            hypernet["aggregator_config"] = _object(aggregator_class, aggregator, changes)
            arguments = {
                "base_model_name_or_path": self.base,
                "hypernet_config": _object(hypernet_class, hypernet, changes),
                "ctx_encoder_args": _object(encoder_class, encoder, changes),
            }
            torch.save(OrderedDict(**tensors, **arguments), path)
        return path


def _swiglu(at: str, i: int, o: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (4 * i, i),
        f"{at}.up_proj.weight": (4 * i, i),
        f"{at}.down_proj.weight": (o, 4 * i),
    }


def _resampler(at: str, latents: int, blocks: int, d: int) -> Shapes:
    found: Shapes = {f"{at}.latents_q": (latents, d), f"{at}.layernorm.weight": (d,)}
    for block in range(blocks):
        layer = f"{at}.layers.{block}"
        for norm in ("input_latents", "input_context", "post_attention"):
            found[f"{layer}.{norm}_layernorm.weight"] = (d,)
        for norm in ("pre_ff", "post_ff"):
            found[f"{layer}.{norm}_layernorm.weight"] = (d,)
        for name, width in {"q": 16 * 128, "k": 4 * 128, "v": 4 * 128}.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = (width, d)
        found |= {f"{layer}.self_attn.o_proj.weight": (d, 16 * 128), **_swiglu(f"{layer}.mlp", d, d)}
    return found


def _object(kind: type, fields: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """An object as an unpickled or trained one is: with these attributes, whatever its class has by now."""
    found = object.__new__(kind)
    found.__dict__.update(
        {key: value for key, value in {**fields, **changes}.items() if key in fields and value is not ...}
    )
    return found


@contextmanager
def _classes() -> Iterator[list[type]]:
    """Classes that pickle finds under the reference's names while the file is written."""
    modules = {name: ModuleType(name) for name in ("ctx_to_lora", "ctx_to_lora.modeling", *CLASSES)}
    classes = []
    for module, name in CLASSES.items():
        kind = make_dataclass(name, ())
        kind.__module__ = module
        setattr(modules[module], name, kind)
        classes.append(kind)
    sys.modules.update(modules)
    try:
        yield classes
    finally:
        for name in modules:
            del sys.modules[name]
