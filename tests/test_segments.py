"""Pieces of a packed row: read from positions as transformers reads them, and laid out against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from d2l.base.segments import Segments, segment_starts

lengths_of_some = st.lists(st.integers(0, 6), min_size=1, max_size=6).map(tuple)
many = settings(derandomize=True, deadline=None, max_examples=60)


@many
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6))
def test_segments_begin_where_transformers_says(pieces: list[tuple[int, int]]) -> None:
    """Whatever the positions begin with; neighbours that count on are one segment, for both."""
    row = torch.cat([torch.arange(first, first + length) for first, length in pieces])[None]
    theirs = find_packed_sequence_indices(row)
    of_each = torch.zeros_like(row) if theirs is None else theirs  # None: a single one
    segments = Segments.from_position_ids(row)
    assert (
        torch.arange(len(segments)).repeat_interleave(torch.tensor(segments.lengths)).equal(of_each[0] - of_each.min())
    )
    assert segment_starts(row).nonzero()[:, 0].tolist() == [sum(segments.lengths[:i]) for i in range(len(segments))]


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [([0, 1, 2, 0, 0, 1], (3, 1, 2)), ([0], (1,)), ([5, 6, 0, 1], (2, 2)), ([0, 1, 3, 4], (2, 2)), ([], ())],
)
def test_read_from_positions(positions: list[int], lengths: tuple[int, ...]) -> None:
    assert Segments.from_position_ids(torch.tensor([positions], dtype=torch.int64)) == Segments(lengths)


def test_neighbours_are_joined() -> None:
    assert Segments((3, 1, 2, 4)).joined((2, 0, 1, 1)) == Segments((4, 0, 2, 4))
    assert Segments(()).joined((0, 0)) == Segments((0, 0))
    with pytest.raises(AssertionError, match="adds up to 2, found 3 segments"):
        Segments((1, 1, 1)).joined((1, 1))


@many
@given(lengths_of_some)
def test_the_grid_holds_every_token_once_in_the_row_of_its_segment(lengths: tuple[int, ...]) -> None:
    place = 0
    grid = Segments(lengths).grid(torch.device("cpu"))
    assert grid.shape == (len(lengths), max(lengths))
    for row, length in zip(grid.tolist(), lengths, strict=True):
        assert row == [*range(place, place + length), *[-1] * (max(lengths) - length)]
        place += length
    assert place == Segments(lengths).n_tokens


@many
@given(lengths_of_some)
def test_padding_equals_a_loop(lengths: tuple[int, ...]) -> None:
    x = torch.randn(2, sum(lengths), 3)
    padded, keys = Segments(lengths).pad(x)
    width = max(1, *lengths)
    assert padded.shape == (2, len(lengths), width, 3)
    assert (keys is None) == (len(set(lengths)) == 1)  # then all are keys
    for segment, (piece, length) in enumerate(zip(x.split(lengths, dim=1), lengths, strict=True)):
        assert padded[:, segment, :length].equal(piece)
        assert not padded[:, segment, length:].any()
        if keys is not None:
            assert keys[segment].tolist() == (
                [True] * length + [False] * (width - length) if length else [True] * width
            )


@many
@given(lengths_of_some)
def test_segments_of_similar_length_are_grouped_without_much_padding(lengths: tuple[int, ...]) -> None:
    segments = Segments(lengths)
    groups = segments.of_similar_length()
    assert sorted(number for group in groups for number in group) == [*range(len(lengths))]
    for group in groups:
        width = max(lengths[i] for i in group)
        assert len(groups) == 1 or all(width < 2 * max(1, lengths[i]) for i in group)
        x = torch.arange(sum(lengths))
        wanted = [place for i in group for place in x.split(lengths)[i].tolist()]
        assert segments.places(group).tolist() == wanted
    if len(groups) == 1:
        padding = len(lengths) * max(lengths) - sum(lengths)
        assert 2 * padding <= sum(lengths) or len({max(0, length - 1).bit_length() for length in lengths}) == 1
