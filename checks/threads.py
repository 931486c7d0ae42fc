"""Threads of torch while checks run: one for twins, and on the device those of the run.

A twin's operations are too small to share, and waiting threads cost time. A kernel compiled under one number of threads is
compiled anew under another: what the checks on a device compile serves the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_of_runs: list[int] = []  # threads outside of each `one_thread` that is open


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread meanwhile."""
    import torch  # here: it takes seconds, and who runs checks without it need not wait

    _of_runs.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_of_runs.pop())


@contextmanager
def threads_of_a_run() -> Iterator[None]:
    """Let torch use as many threads meanwhile as outside of `one_thread`."""
    if not _of_runs:
        yield
        return
    import torch  # here: as above

    torch.set_num_threads(_of_runs[-1])
    try:
        yield
    finally:
        torch.set_num_threads(1)
