"""Ways to divide a document of many tokens into consecutive pieces: of equal length, or at given places."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol


class Division(Protocol):
    """A way to divide a document into consecutive pieces of at most a certain length."""

    @property
    def fewest(self) -> int:
        """The smallest number of pieces."""

    @property
    def most(self) -> int:
        """The largest number of pieces that can be asked for."""

    def ends(self, count: int) -> list[int]:
        """Return where each of `count` pieces ends, in tokens from the start of the document; the last is its length."""


@dataclass(frozen=True)
class EqualDivision:
    """Division of `length` tokens into pieces of equal length, of at most `longest`, as the reference divides.

    Source: `split_too_long_ctx` of SakanaAI/doc-to-lora@baa85db (`data/processing.py`): n pieces have ceil(length / n)
    tokens each, and the last one has the rest. Where that leaves nothing for the last ones there are fewer than n.
    """

    length: int
    longest: int

    @property
    def fewest(self) -> int:
        """The smallest number of pieces."""
        return math.ceil(self.length / self.longest)

    @property
    def most(self) -> int:
        """The largest number of pieces: of a token each."""
        return self.length

    def ends(self, count: int) -> list[int]:
        """Return where each piece ends: of `count` pieces or, where the last ones would be empty, of fewer."""
        step = math.ceil(self.length / count)
        return [*range(step, self.length, step), self.length]


@dataclass(frozen=True)
class PlacedDivision:
    """Division at given places only, into pieces of at most `longest` tokens, as equal as the places allow.

    Args:
        places: where a piece may end, in tokens, ascending; the last is the document's length. Neighbours are at most
            `longest` apart: see `fill_gaps`.
    """

    places: Sequence[int]
    longest: int

    @property
    def fewest(self) -> int:
        """The smallest number of pieces."""
        return self._needed[0]

    @property
    def most(self) -> int:
        """The largest number of pieces: one for every place."""
        return len(self.places)

    def ends(self, count: int) -> list[int]:
        """Return where each of `count` pieces ends: each as near as possible to an equal share of what is left.

        Between `fewest` and `most` there always is such a division.
        """
        points, last, at = self._points, len(self._points) - 1, 0
        found = []
        for rest in range(count - 1, 0, -1):  # pieces after this one
            # far enough that `rest` pieces can hold what follows, and not so far that one of them has no place
            first = bisect_left(self._needed, -rest, lo=at + 1, key=lambda needed: -needed)
            furthest = min(self._reach(at), last - rest)
            share = points[at] + (points[last] - points[at]) / (rest + 1)
            at = min(range(first, furthest + 1), key=lambda place: abs(points[place] - share))
            found.append(points[at])
        return [*found, points[last]]

    @cached_property
    def _points(self) -> list[int]:
        return [0, *self.places]

    @cached_property
    def _needed(self) -> list[int]:
        """How many pieces what follows each point needs; it never grows from one point to the next."""
        needed = [0] * len(self._points)
        for at in reversed(range(len(self.places))):
            needed[at] = 1 + needed[self._reach(at)]  # as much as fits is never worse than less
        return needed

    def _reach(self, at: int) -> int:
        """Return the last point that a piece from this point can end at."""
        return bisect_right(self._points, self._points[at] + self.longest) - 1


def fill_gaps(places: Sequence[int], finer: Sequence[int], longest: int) -> list[int]:
    """Add places until no two neighbours are further than `longest` apart: the last finer one within reach, else a token.

    Args:
        places, finer: in tokens, ascending.
    """
    filled, start = [], 0
    for end in places:
        while end - start > longest:
            reach = bisect_right(finer, start + longest)
            start = finer[reach - 1] if reach and finer[reach - 1] > start else start + longest
            filled.append(start)
        filled.append(end)
        start = end
    return filled
