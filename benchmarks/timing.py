"""Interleaved timing: two pieces of work by turns, so that what slows the machine slows both, and the spread of the ratio."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Times of ours over times of the rule, pair by pair."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """Smallest and largest ratio."""
        return f"{min(self.values):.2f}–{max(self.values):.2f}"


def ratio(ours: Work, rule: Work, repeats: int = 7) -> Ratio:
    """Time both by turns, after one untimed call of each, and return ours / rule for every turn."""
    ours()
    rule()
    return Ratio(tuple(seconds(ours) / seconds(rule) for _ in range(repeats)))


def seconds(work: Work) -> float:
    """Return the wall time of one call, kernels on a GPU included."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
