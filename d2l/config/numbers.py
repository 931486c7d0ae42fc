"""The number types of configuration keys: neither booleans nor infinities, and whole numbers written as `1e3` too."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

_EXACT = 2**53  # a schedule divides numbers of steps in floats


def _not_a_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _whole(value: Any) -> Any:
    """Read `"1e3"`, which YAML takes for text, as a number; whether it is whole is left to pydantic."""
    value = _not_a_boolean(value)
    if isinstance(value, str) and not value.strip().lstrip("+-").isdigit():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _exact(value: int) -> int:
    if value > _EXACT:
        raise ValueError(f"expected a whole number of at most {_EXACT:,}, which is as far as floats are exact")
    return value


_UNITS = {"": 1, "b": 1} | {f"{prefix}ib": 2 ** (10 * n) for n, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}


def read_bytes(value: Any) -> int:
    """Read a number of bytes: a whole number, or a number with a unit, such as `80GiB` (2^30 each) or `24 GB` (10^9).

    Raises:
        ValueError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    if (
        isinstance(value, bool)
        or found is None
        or found[2] not in _UNITS
        or not float(found[1]) * _UNITS[found[2]] >= 1
    ):
        raise ValueError("expected a number of bytes such as 80GiB, 24GB or 85899345920")
    return round(float(found[1]) * _UNITS[found[2]])


WHOLE = BeforeValidator(_whole)
REAL = BeforeValidator(_not_a_boolean)

# Constraints stand before the validator: pydantic writes them into a JSON Schema in this order only.
Whole = Annotated[int, WHOLE]
Count = Annotated[int, Field(ge=1), WHOLE, AfterValidator(_exact)]
Several = Annotated[int, Field(ge=2), WHOLE]
NonNegative = Annotated[int, Field(ge=0), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**32), WHOLE]  # as wide as every generator of random numbers takes
Length = Annotated[int, Field(ge=-1), WHOLE]  # tokens; -1 means no limit
Digits = Annotated[int, Field(ge=1, le=4), WHOLE]
MultipleOfFour = Annotated[int, Field(ge=4, multiple_of=4), WHOLE]
Bytes = Annotated[int, Field(ge=1), BeforeValidator(read_bytes)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), REAL]
NonNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False), REAL]
Fraction = Annotated[float, Field(ge=0, lt=1), REAL]
Probability = Annotated[float, Field(ge=0, le=1), REAL]
PositiveShare = Annotated[float, Field(gt=0, le=1), REAL]
