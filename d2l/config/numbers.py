"""The number types of configuration keys: neither booleans nor infinities, and whole numbers written as `1e3` too."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


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


WHOLE = BeforeValidator(_whole)
REAL = BeforeValidator(_not_a_boolean)

# Constraints stand before the validator: pydantic writes them into a JSON Schema in this order only.
Whole = Annotated[int, WHOLE]
Count = Annotated[int, Field(ge=1), WHOLE]
NonNegative = Annotated[int, Field(ge=0), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**32), WHOLE]  # as wide as every generator of random numbers takes
Length = Annotated[int, Field(ge=-1), WHOLE]  # tokens; -1 means no limit
Digits = Annotated[int, Field(ge=1, le=4), WHOLE]
MultipleOfFour = Annotated[int, Field(ge=4, multiple_of=4), WHOLE]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), REAL]
NonNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False), REAL]
Fraction = Annotated[float, Field(ge=0, lt=1), REAL]
Probability = Annotated[float, Field(ge=0, le=1), REAL]
PositiveShare = Annotated[float, Field(gt=0, le=1), REAL]
