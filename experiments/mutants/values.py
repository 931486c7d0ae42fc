"""Values that a witness records, and their comparison with those of the code as it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-6  # of the largest value: a smaller change is rounding


class DiffersError(BaseException):
    """The first value that differs; no code under a witness catches it."""


class Values(dict[str, Any]):
    """Values by name: tensors, or anything that JSON holds.

    Args:
        healthy: values to compare with; the first that differs ends the witness with `DiffersError`.
    """

    def __init__(self, healthy: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._healthy = healthy

    def __setitem__(self, name: str, value: Any) -> None:
        kept = value.detach().clone() if isinstance(value, Tensor) else value
        super().__setitem__(name, kept)
        if self._healthy is None:
            return
        if name not in self._healthy:
            raise DiffersError(f"{name}: is new")
        if difference := _difference(self._healthy[name], kept):
            raise DiffersError(f"{name}: {difference}")

    def __ior__(self, other: Any) -> "Values":  # type: ignore[override,misc]
        for name, value in other.items():
            self[name] = value
        return self

    def finish(self) -> None:
        """Compare what is missing.

        Raises:
            DiffersError: a value is gone.
        """
        for name in self._healthy or {}:
            if name not in self:
                raise DiffersError(f"{name}: is gone")


def _difference(one: Any, other: Any) -> str:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _tensor_difference(one, other)
    if isinstance(one, float) and isinstance(other, float):
        return _tensor_difference(torch.tensor([one]).double(), torch.tensor([other]).double())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return f"{_kind(one)} → {_kind(other)}"
    return "" if one == other else _text_difference(str(one), str(other))


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else str(value)[:40]


def _text_difference(one: str, other: str) -> str:
    """Show two texts from a little before where they part."""
    parting = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = max(0, parting - 20)
    return f"…{one[start : start + 50]}… → …{other[start : start + 50]}…"


def _tensor_difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shape {list(one.shape)} → {list(other.shape)}"
    one, other = one.double(), other.double()
    if not one.numel() or (torch.equal(one.nan_to_num(), other.nan_to_num()) and one.isnan().equal(other.isnan())):
        return ""
    worst = float((one - other).nan_to_num(nan=torch.inf).abs().max())
    finite = one[one.isfinite()]
    largest = float(finite.abs().amax()) if finite.numel() else 0.0
    return f"by {worst:.3g} of {largest:.3g}" if worst > TOLERANCE * largest else ""
