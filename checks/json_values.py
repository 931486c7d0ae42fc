"""Conversion of evidence into values that JSON can hold."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def jsonable(value: Any) -> Any:
    """Convert a value into what JSON can hold: tuples and sets into lists, tensors and arrays into numbers or lists of
    them; paths, NaN and infinities into strings.

    Raises:
        TypeError: there is no such value.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays, without importing either
        return jsonable(value.tolist())
    raise TypeError(f"evidence must be what JSON can hold. Got {type(value).__name__}: {value!r:.200}")
