"""Work shared by forked processes, which inherit whatever was read and computed before, or done by a group of them."""

import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import current_process, get_all_start_methods, get_context
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

PATIENCE = 120.0  # seconds for all processes of a group together
LOOPBACK = {"darwin": "lo0"}.get(
    sys.platform, "lo"
)  # the interface through which they talk, whatever the host is called


class GroupError(Exception):
    """A process of a group failed, or its processes waited for each other; the message has the end of its output."""


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(task: Callable[[int], Value], count: int, workers: int) -> Iterator[Value]:
    """Yield `task(0)`, `task(1)`, …, `task(count - 1)`, in order; in this process where it can or may not fork.

    Only the number of a task and its value, which pickle has to take, are sent between processes.
    """
    workers = min(count, workers)
    with _outside_collection():
        if workers < 2 or not can_fork() or current_process().daemon:
            yield from map(task, range(count))
            return
        with _inherited(task), ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            yield from pool.map(_inherited_task, range(count))


def can_fork() -> bool:
    """Tell whether a forked process can work: not with a CUDA that this one has asked for, which a fork cannot use."""
    torch = sys.modules.get("torch")
    return "fork" in get_all_start_methods() and not (torch is not None and torch.cuda.is_available())


@contextmanager
def _outside_collection() -> Iterator[None]:
    """Leave what there is out of garbage collection meanwhile: libraries are much to walk through, and stay."""
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


def in_group(task: Callable[[], Value], count: int) -> list[Value]:
    """Return what a task gives in each process of a group of torch's, on CPUs; each finds what torchrun would tell it.

    Only the values, which pickle has to take, are sent back.

    Raises:
        GroupError: a process fails, or they do not come to an end.
    """
    with tempfile.TemporaryDirectory(prefix="d2l-") as place:
        folder = Path(place)
        context: Any = get_context("fork")
        members = [context.Process(target=_member, args=(task, rank, count, folder)) for rank in range(count)]
        for member in members:
            member.start()
        try:
            _wait(members, folder)
        finally:
            for member in members:
                member.kill()
                member.join()
        return [pickle.loads(_value(folder, rank).read_bytes()) for rank in range(count)]


def _wait(members: "list[Any]", folder: Path) -> None:
    """Wait until all processes of a group have ended, one has failed, or it takes too long."""
    end = time.monotonic() + PATIENCE
    while any(member.is_alive() for member in members):
        if time.monotonic() > end:
            raise GroupError(f"{len(members)} processes wait for each other: no end after {PATIENCE:.0f} s")
        failed = [rank for rank, member in enumerate(members) if member.exitcode]
        if failed:
            break
        time.sleep(0.01)
    for rank, member in enumerate(members):
        if member.exitcode:
            said = (folder / f"{rank}.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise GroupError(f"process {rank}: {said[-1] if said else f'ended with {member.exitcode}'}")


def _member(task: Callable[[], Any], rank: int, count: int, folder: Path) -> None:
    """Join the group, do the task, and leave the value, or what was said, in the folder."""
    import torch
    from torch import distributed

    gc.freeze()  # what was inherited: a collection would copy its memory
    with (folder / f"{rank}.txt").open("w", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout = sys.stderr = said
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME=LOOPBACK)
        torch.set_num_threads(1)
        try:
            store = distributed.FileStore(str(folder / "store"), count)
            patience = timedelta(seconds=PATIENCE)  # of those whose parent was killed, too
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)
            _value(folder, rank).write_bytes(pickle.dumps(task()))
            distributed.destroy_process_group()
        except Exception as error:
            traceback.print_exc(file=said)
            said.write(f"{type(error).__name__}: {error}".splitlines()[0])  # what the finding says of it
            said.flush()
            os._exit(1)
        said.flush()
        os._exit(0)


def _value(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pickle"
