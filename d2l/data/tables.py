"""Tables of numbers that a record carries, in 4 or 8 bytes a number: a teacher's log-probabilities and token ids."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

_DTYPES = {float: np.float64, int: np.int64}
_SMALL = np.iinfo(np.int32)


class Table(Sequence[tuple[Any, ...]]):
    """Rows of numbers, equal to nested tuples of the same numbers, which take 32 bytes a number and more.

    Args:
        values: float64, int32 or int64 [rows, columns]; nobody may write into it afterwards.
    """

    __slots__ = ("_values",)

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> "Table": ...

    def __getitem__(self, index: int | slice) -> "tuple[Any, ...] | Table":
        found = self._values[index]
        return Table(found) if isinstance(index, slice) else tuple(found.tolist())

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(tuple, self._values.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._values if dtype is None else self._values.astype(dtype, copy=False)
        if copy is False and values is not self._values:
            raise ValueError(f"numbers in {self._values.dtype} are {dtype} only in a copy")
        return values.copy() if copy else values

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Table | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def compact(value: Any) -> Any:
    """Return a nested list as a `Table` where that loses nothing, else as nested tuples.

    A table's rows are equally long and not empty, and its numbers all of one kind: floats, or integers of 64 bits.
    """
    if not isinstance(value, list):
        return value
    lengths = {len(row) if isinstance(row, list) else 0 for row in value}
    kinds = {type(number) for row in value if isinstance(row, list) for number in row}
    if len(lengths) == len(kinds) == 1 and 0 not in lengths and kinds <= _DTYPES.keys():
        try:
            values = np.array(value, dtype=_DTYPES[kinds.pop()])
        except OverflowError:  # an integer of more bits
            return _tuples(value)
        is_small = values.dtype == np.int64 and values.min() >= _SMALL.min and values.max() <= _SMALL.max
        return Table(values.astype(np.int32) if is_small else values)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
