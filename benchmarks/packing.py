"""Benchmark of packing: speed and fill, beside the reference's greedy rule. `python benchmarks/packing.py [ROWS …]`.

Lengths are long-tailed (log-normal, clipped to the budgets). Fill is a lower bound on the number of batches, from the
number of tokens, divided by the number of batches made: 1 cannot be reached when rows are long.
"""

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from d2l.data.packing import pack

Sizes = Sequence[tuple[int, int]]


def next_fit(sizes: Sizes, max_inp: int, max_ctx: int, max_rows: int = -1) -> list[tuple[int, ...]]:
    """Pack by the reference's rule: rows in order, a new batch where the next does not fit; oversized rows are dropped."""
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    inp_used = ctx_used = 0
    for row, (inp, ctx) in enumerate(sizes):
        oversized = inp > max_inp or ctx > max_ctx
        full = inp_used + inp > max_inp or ctx_used + ctx > max_ctx or len(group) == max_rows
        if group and (full or oversized):
            groups.append(tuple(group))
            group, inp_used, ctx_used = [], 0, 0
        if not oversized:
            group.append(row)
            inp_used, ctx_used = inp_used + inp, ctx_used + ctx
    return [*groups, tuple(group)] if group else groups


def draw_sizes(count: int, max_inp: int, max_ctx: int, seed: int = 0) -> list[tuple[int, int]]:
    """Draw sizes of rows: median documents of 745 tokens and questions of 315; a fortieth is about seven times as long."""
    generator = np.random.default_rng(seed)
    ctx = 80 + generator.lognormal(6.5, 1.0, count).astype(int)
    inp = 70 + generator.lognormal(5.5, 1.0, count).astype(int)
    return list(zip(inp.clip(max=max_inp).tolist(), ctx.clip(max=max_ctx).tolist(), strict=True))


def count_greedy_batches(sizes: Sizes, budgets: tuple[int, int]) -> int:
    """Count the batches of the reference's rule."""
    return len(next_fit(sizes, *budgets))


def count_batches(sizes: Sizes, budgets: tuple[int, int]) -> int:
    """Count the batches of `pack`."""
    return len(pack(sizes, *budgets, seed=0).groups)


def measure(rule: Callable[[Sizes, tuple[int, int]], int], sizes: Sizes, budgets: tuple[int, int]) -> tuple[str, str]:
    """Measure rows per second and fill of a rule, which returns its number of batches."""
    start = time.perf_counter()
    batches = rule(sizes, budgets)
    seconds = time.perf_counter() - start
    least = (np.array(sizes).sum(axis=0) / budgets).max()
    return f"{len(sizes) / seconds:,.0f}", f"{least / batches:.3f}"


def main(counts: Sequence[int]) -> None:
    """Print a table with a line for each budget, number of rows and rule."""
    table = Table("rows", "budgets", "rule", "rows/s", "fill")
    for budgets in ((16384, 32768), (4096, 8192), (2048, 4096)):
        for count in counts:
            sizes = draw_sizes(count, *budgets)
            for name, rule in (("greedy", count_greedy_batches), ("d2l", count_batches)):
                table.add_row(f"{count:,}", f"{budgets[0]:,} / {budgets[1]:,}", name, *measure(rule, sizes, budgets))
    Console().print(table)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [10_000, 100_000, 1_000_000])
