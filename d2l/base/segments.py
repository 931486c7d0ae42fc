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

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give every segment a row of its own, with zeros after its tokens.

        A segment of no tokens keeps its zeros as keys: a softmax over nothing would be NaN.

        Args:
            x: [L, T, D].

        Returns:
            [L, n, S, D], and bool [n, S]: which of them are keys.
        """
        n, width = len(self), max(1, *self.lengths)
        lengths = torch.tensor(self.lengths)[:, None]
        occupied = torch.arange(width) < lengths
        cells = occupied.flatten().nonzero().flatten().to(x.device)
        padded = x.new_zeros(x.shape[0], n * width, x.shape[2]).index_copy(1, cells, x)
        return rearrange(padded, "l (n s) d -> l n s d", n=n), (occupied | (lengths == 0)).to(x.device)
