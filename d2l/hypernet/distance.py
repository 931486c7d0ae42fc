"""How far two LoRAs are from each other, as updates of the base's weights: no matrix of the size of a weight is formed.

Shape legend: n = contexts, L = decoder layers, R = rank.
"""

from dataclasses import dataclass

from torch import Tensor

from d2l.hypernet.lora import Lora


@dataclass(frozen=True)
class UpdateDistance:
    """Squared sizes of the updates ΔW = scale · Aᵀ B of pairs of LoRAs, by module, over all pairs and layers.

    Attributes:
        difference: module name → Σ ‖ΔW - ΔW'‖².
        norm: module name → Σ (‖ΔW‖² + ‖ΔW'‖²) / 2.
    """

    difference: dict[str, float]
    norm: dict[str, float]

    def __add__(self, other: "UpdateDistance") -> "UpdateDistance":
        """Return the distance over the pairs of both."""
        difference, norm = (
            {name: mine[name] + theirs[name] for name in mine}
            for mine, theirs in ((self.difference, other.difference), (self.norm, other.norm))
        )
        return UpdateDistance(difference, norm)

    def relative(self, *modules: str) -> float:
        """Return distance over norm of some modules, or of all: 0 for equal updates, √2 for unrelated ones, 2 at most.

        0 where all updates are zero.
        """
        names = modules or tuple(self.norm)
        norm = sum(self.norm[name] for name in names)
        return float((sum(self.difference[name] for name in names) / norm) ** 0.5) if norm else 0.0


def update_distance(one: Lora, other: Lora) -> UpdateDistance:
    """Measure each context of one LoRA against the same context of the other, whatever their ranks.

    ⟨ΔW, ΔW'⟩ = Σ (A A'ᵀ) ∘ (B B'ᵀ), R² · (d_in + d_out) products. In float64, so that near ones are told from equal
    ones, and a context at a time, so that few values are copied. The host waits for the device.
    """
    difference, norm = dict.fromkeys(one.A, 0.0), dict.fromkeys(one.A, 0.0)
    for context in range(one.n_contexts):
        mine, theirs = one[context], other[context]
        for name in one.A:
            sizes = _inner(mine, mine, name) + _inner(theirs, theirs, name)
            difference[name] += max(0.0, float(sizes - 2 * _inner(mine, theirs, name)))
            norm[name] += float(sizes) / 2
    return UpdateDistance(difference, norm)


def _inner(one: Lora, other: Lora, name: str) -> Tensor:
    """Return ⟨ΔW, ΔW'⟩ of a module, over contexts and layers; float64 scalar."""
    A, B = (getattr(one, side)[name].double() @ getattr(other, side)[name].double().mT for side in "AB")
    return (A * B).sum() * one.scale * other.scale
