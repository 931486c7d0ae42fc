"""Consecutive pieces of a packed row, and where they begin: documents, chunks, questions, all questions of a context.

Shape legend: T = tokens of the row, n = segments, S = tokens of the longest one, L = layers, D = values of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from d2l.base.transfer import moved


def segment_starts(position_ids: Tensor) -> Tensor:
    """Mark the first token of every segment: a position that is not one more than the one before.

    This is the rule by which transformers itself detects packed rows, so its masks and ours agree on any positions.

    Args:
        position_ids: int64 [1, T].

    Returns:
        bool [T].
    """
    positions = position_ids[0]
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[1:] = positions[1:] != positions[:-1] + 1
    return starts


@dataclass(frozen=True)
class Segments:
    """Consecutive pieces of a packed row, by their lengths in tokens; 0 is allowed.

    Attributes:
        lengths: tokens of each segment, in the order of the row.
    """

    lengths: tuple[int, ...]

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Self:
        """Read the segments of a row off its positions, int64 [1, T]."""
        starts = segment_starts(position_ids).nonzero()[:, 0].tolist()
        return cls(tuple(end - start for start, end in pairwise([*starts, position_ids.shape[1]])))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of all segments, T."""
        return sum(self.lengths)

    def joined(self, counts: Sequence[int]) -> "Segments":
        """Join neighbours: the first `counts[0]` segments become one, the next `counts[1]` another, and so on."""
        assert sum(counts) == len(self), f"{tuple(counts)} adds up to {sum(counts)}, found {len(self)} segments"
        ends = accumulate(counts, initial=0)
        return Segments(tuple(sum(self.lengths[start:end]) for start, end in pairwise(ends)))

    def grid(self, device: torch.device) -> Tensor:
        """Lay the places 0 … T - 1 of the tokens out by segment.

        Returns:
            int64 [n, S]: row i holds the places of segment i's tokens, then -1.
        """
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        steps = torch.arange(max(self.lengths), device=device)
        return torch.where(steps < lengths, lengths.cumsum(0) - lengths + steps, -1)

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give every segment a row of its own, with zeros after its tokens.

        A segment of no tokens keeps its zeros as keys: a softmax over nothing would be NaN.

        Args:
            x: [L, T, D].

        Returns:
            [L, n, S, D], and bool [n, S]: which of them are keys; None where all are, because no segment is longer.
        """
        n, width = len(self), max(1, *self.lengths)
        if self.n_tokens == n * width:
            return rearrange(x, "l (n s) d -> l n s d", n=n), None
        lengths = torch.tensor(self.lengths)[:, None]
        occupied = torch.arange(width) < lengths
        cells = moved(occupied.flatten().nonzero().flatten(), x.device)
        padded = x.new_zeros(x.shape[0], n * width, x.shape[2]).index_copy(1, cells, x)
        keys = None if len(set(self.lengths)) == 1 else moved(occupied | (lengths == 0), x.device)
        return rearrange(padded, "l (n s) d -> l n s d", n=n), keys

    def of_similar_length(self) -> list[tuple[int, ...]]:
        """Group the segments, so that padding within a group never doubles one: lists of their numbers, ascending.

        All are one group where padding them to the longest adds less than half of their tokens.
        """
        if len(self) * max(self.lengths) <= 1.5 * self.n_tokens:
            return [tuple(range(len(self)))]
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(self.lengths):
            groups.setdefault(max(0, length - 1).bit_length(), []).append(number)
        return [tuple(numbers) for _, numbers in sorted(groups.items())]

    def places(self, numbers: Sequence[int]) -> Tensor:
        """Return the places of these segments' tokens in the row, one segment after another; int64, on the CPU."""
        starts = [*accumulate(self.lengths, initial=0)]
        return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in numbers])
