"""How far the LoRAs of two documents are from each other, as updates of the base's weights, none of which is formed.

Shape legend: L = decoder layers, R = rank. An update is ΔW = scale · Aᵀ B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

import torch

from d2l.hypernet.lora import Lora


@dataclass(frozen=True)
class UpdateProducts:
    """Inner products of two documents' updates over all layers, by module: ⟨ΔW, ΔW⟩, ⟨ΔW', ΔW'⟩ and ⟨ΔW, ΔW'⟩."""

    one: dict[str, float]
    other: dict[str, float]
    between: dict[str, float]

    def distance(self, modules: Sequence[str]) -> float:
        """Return ‖ΔW - ΔW'‖ over some modules, each taken at norm 1: 0 for equal directions, √2 for unrelated ones.

        0 where one of them is zero.
        """
        one, other, between = (sum(it[name] for name in modules) for it in (self.one, self.other, self.between))
        return sqrt(max(0.0, 2 - 2 * between / sqrt(one * other))) if one > 0 and other > 0 else 0.0


def mean_distance(pairs: Sequence[UpdateProducts], *modules: str) -> float:
    """Return the mean of the pairs' distances over some modules; default: over all of them."""
    return fmean(pair.distance(modules or tuple(pair.between)) for pair in pairs)


def compare_updates(one: Lora, other: Lora, shared: Lora | None = None) -> list[UpdateProducts]:
    """Compare each context of one LoRA with the same context of the other, whatever their ranks.

    ⟨ΔW, ΔW'⟩ = Σ (A A'ᵀ) ∘ (B B'ᵀ), R² · (d_in + d_out) products. In float64, so that near ones are told from equal
    ones, and a context at a time, so that few values are copied. The host waits for the device.

    Args:
        shared: a LoRA of one context that is part of all of them, and is subtracted.
    """
    found = []
    for context in range(one.n_contexts):
        mine, theirs = _without(one[context], shared), _without(other[context], shared)
        found.append(UpdateProducts(_products(mine, mine), _products(theirs, theirs), _products(mine, theirs)))
    return found


def _without(lora: Lora, shared: Lora | None) -> Lora:
    """Return a LoRA in float64 whose update is that of one less that of the other: its rows, then the other's."""
    A, B = ({name: x.double() for name, x in side.items()} for side in (lora.A, lora.B))
    if shared is not None:
        A = {name: torch.cat([x, shared.A[name].double()], dim=2) for name, x in A.items()}
        B = {name: torch.cat([x, -shared.B[name].double()], dim=2) for name, x in B.items()}
    return Lora(A, B, lora.scale)


def _products(one: Lora, other: Lora) -> dict[str, float]:
    """Return ⟨ΔW, ΔW'⟩ of each module, over contexts and layers."""
    grams = {name: (one.A[name] @ other.A[name].mT) * (one.B[name] @ other.B[name].mT) for name in one.A}
    return {name: float(gram.sum()) * one.scale * other.scale for name, gram in grams.items()}
