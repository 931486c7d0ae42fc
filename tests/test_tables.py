"""Tables of a record: the nested tuples that they stand for, in every use, and a fraction of their memory."""

import json
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2l.data.tables import Table, compact

NUMBERS = (st.floats(allow_nan=False), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1))


def nested_tuples(value: Any) -> Any:
    return tuple(map(nested_tuples, value)) if isinstance(value, list) else value


@st.composite
def tables(draw: st.DrawFn) -> list[list[Any]]:
    width, numbers = draw(st.integers(1, 4)), draw(st.sampled_from(NUMBERS))
    return draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=5))


@given(tables())
def test_a_table_is_used_as_nested_tuples_are(value: list[list[Any]]) -> None:
    expected, found = nested_tuples(value), compact(value)
    assert isinstance(found, Table)
    assert found == expected
    assert expected == found
    assert [*found] == [*expected]
    assert [type(number) for row in found for number in row] == [type(number) for row in value for number in row]
    assert (found[0], found[-1], len(found)) == (expected[0], expected[-1], len(expected))
    assert (found[1:], found[::-1]) == (expected[1:], expected[::-1])
    assert (hash(found), repr(found)) == (hash(expected), repr(expected))
    assert json.dumps(found, default=list) == json.dumps(expected)
    assert pickle.loads(pickle.dumps(found)) == expected
    assert np.asarray(found).tolist() == value
    assert found != (*expected, (0,))
    assert found != value  # as a tuple differs from a list


def test_a_table_becomes_an_array_of_numpy_1_and_2() -> None:
    found = compact([[0.1, 2.0]])
    assert found.__array__() is found.__array__(np.float64, copy=False)
    assert found.__array__(copy=True) is not found.__array__()
    assert found.__array__(np.float32).tolist() == [[np.float32(0.1), 2.0]]
    with pytest.raises(ValueError, match=r"float64 are .*float32.* only in a copy"):
        found.__array__(np.float32, copy=False)


def test_a_table_becomes_the_same_tensor() -> None:
    value = [[-0.1, -3.0], [-0.7, -1e-9]]
    assert torch.equal(torch.tensor(compact(value)), torch.tensor(value))
    assert torch.equal(torch.tensor(compact([[3, 200_000]])), torch.tensor([[3, 200_000]]))


@pytest.mark.parametrize(
    "value",
    [
        *([], [[]], [[1.0], []], [[1.0], [1.0, 2.0]], [1.0, 2.0], [[1.0], 2.0], [[[1.0]]]),
        *([[1.0, 2]], [[True]], [[None]], [["1"]], [[2**63]], "text", None, {"a": [1]}),
    ],
    ids=str,
)
def test_what_a_table_would_change_stays_nested(value: Any) -> None:
    """Problems in it are reported later, as they were found, and the hash of data does not depend on its form."""
    found = compact(value)
    assert not isinstance(found, Table)
    assert found == nested_tuples(value)


@pytest.mark.parametrize(("value", "bound"), [(-0.123456789, 9), (123_456, 5), (2**40, 9)])
def test_a_table_takes_few_bytes_a_number(value: float, bound: float) -> None:
    def taken(form: Callable[[Any], Any]) -> float:
        tracemalloc.start()
        made = form([[value + column for column in range(16)] for _ in range(500)])
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size / (len(made) * 16)

    assert taken(compact) < bound
    assert taken(nested_tuples) > 30
