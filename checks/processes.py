"""Work shared by forked processes, which inherit whatever was read and computed before."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import current_process, get_all_start_methods, get_context
from typing import Any, TypeVar

Value = TypeVar("Value")


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(task: Callable[[int], Value], count: int, workers: int) -> Iterator[Value]:
    """Yield `task(0)`, `task(1)`, …, `task(count - 1)`, in order; in this process where it can or may not fork.

    Only the number of a task and its value, which pickle has to take, are sent between processes.
    """
    workers = min(count, workers)
    with _outside_collection():
        if workers < 2 or not _can_fork() or current_process().daemon:
            yield from map(task, range(count))
            return
        with _inherited(task), ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            yield from pool.map(_inherited_task, range(count))


def _can_fork() -> bool:
    """Tell whether a forked process can work: not with a CUDA that this one has asked for, which a fork cannot use."""
    torch = sys.modules.get("torch")
    return "fork" in get_all_start_methods() and not (torch is not None and torch.cuda.is_available())


@contextmanager
def _outside_collection() -> Iterator[None]:
    """Leave what there is out of garbage collection meanwhile: libraries are much to walk through, and stay."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_tasks: list[Callable[[int], Any]] = []  # what forked workers find here


@contextmanager
def _inherited(task: Callable[[int], Any]) -> Iterator[None]:
    _tasks.append(task)
    try:
        yield
    finally:
        _tasks.pop()


def _inherited_task(index: int) -> Any:
    return _tasks[-1](index)
