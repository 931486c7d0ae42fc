"""Stored numbers of the reference implementation: the LoRAs that its hypernetwork makes of a few documents.

Source: `reference.json`, made with the classes of SakanaAI/doc-to-lora@baa85db on a CPU in float32. Weights are not stored:
they follow from the fill rule, those of the base under names that begin with `base.`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checks.oracles.fill import fill


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A tiny base and hypernetwork of the reference, and the LoRAs that it makes of these documents.

    Attributes:
        name: of the case.
        config: the hypernetwork's and encoder's settings, under the run's keys.
        model_type, base_config: of the base, for transformers.
        scale: factor of every delta.
        contexts: token ids, [context][chunk].
        base_weights, weights: parameters of base and hypernetwork by name, float32.
        A, B: module name -> [contexts, L, R, d].
    """

    name: str
    config: Mapping[str, Any]
    model_type: str
    base_config: Mapping[str, Any]
    scale: float
    contexts: tuple[tuple[tuple[int, ...], ...], ...]
    base_weights: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]


@cache
def stored_cases() -> tuple[StoredCase, ...]:
    """Read the cases that are shipped: one of several chunks and layer-wise features, one of two modules and an early exit."""
    cases = json.loads(Path(__file__).with_name("reference.json").read_text(encoding="utf-8"))["cases"]
    return tuple(_read(case) for case in cases)


def _read(case: dict[str, Any]) -> StoredCase:
    seed = case.pop("seed")
    A, B = ({name: torch.tensor(values) for name, values in case.pop(side).items()} for side in ("A", "B"))
    base_weights = {name: fill(f"base.{name}", seed, *rule) for name, rule in case.pop("base_weights").items()}
    weights = {name: fill(name, seed, *rule) for name, rule in case.pop("weights").items()}
    contexts = tuple(tuple(map(tuple, chunks)) for chunks in case.pop("contexts"))
    return StoredCase(**case, contexts=contexts, base_weights=base_weights, weights=weights, A=A, B=B)
