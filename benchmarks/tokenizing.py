"""Benchmark of tokenizing with and without the cache: `python benchmarks/tokenizing.py [RECORDS …]`.

Needle records of about 110 words. Cold writes the cache; warm finds it and hashes the records and the files. Rates are by
CPU time, so that other work on the machine matters little; `drawn` reads every row once. Memory is what the rows
allocate, without what is mapped from files.
"""

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from d2l.data.cache import cached_rows
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.needles import needle_records
from d2l.data.shards import row_sizes
from d2l.data.tokenize import Limits, Tokenized, tokenize_records

MIB = 2**20


def measure_memory(make: Callable[[], Tokenized]) -> float:
    """Return the memory in MiB that stays allocated while the result exists."""
    tracemalloc.start()
    made = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert made.rows
    return held / MIB


def measure(make: Callable[[], Tokenized]) -> tuple[float, float, float]:
    """Measure the CPU seconds for making the rows, for their sizes, and for reading every row."""
    times = [time.process_time()]
    rows = make().rows
    times.append(time.process_time())
    row_sizes(rows)
    times.append(time.process_time())
    assert all(row.queries for row in rows)
    times.append(time.process_time())
    making, sizing, reading = (end - start for start, end in pairwise(times))
    return making, sizing, reading


def compare(count: int, chat: ChatFormat, folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield a line of the table for each way of tokenizing."""
    records, limits = needle_records(count, pairs=2, digits=2, filler_words=96, seed=0), Limits()

    def uncached() -> Tokenized:
        return tokenize_records(records, chat, limits, 0)

    def cached() -> Tokenized:
        return cached_rows(records, chat, limits, 0, folder)

    uncached_seconds = None
    for name, make in (("no cache", uncached), ("cold", cached), ("warm", cached)):
        seconds = measure(make)
        uncached_seconds = uncached_seconds or seconds[0]
        rates = [f"{count / duration:,.0f}" for duration in seconds]
        held = f"{measure_memory(make):.2f}" if name != "cold" else ""  # a second cold build would be a warm one
        yield f"{count:,}", name, rates[0], f"{uncached_seconds / seconds[0]:.2f}", *rates[1:], held


def main(counts: Sequence[int]) -> None:
    """Print a table with a line for each number of records and way of tokenizing."""
    chat = chat_format(load_tokenizer("configs/models/tiny_gpt_oss"))
    table = Table("records", "how", "records/s", "ratio", "sizes/s", "drawn/s", "MiB held")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            for line in compare(count, chat, Path(folder)):
                table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [100, 1000, 10_000])
