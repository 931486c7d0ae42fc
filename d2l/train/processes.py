"""Processes that share each optimizer step, the device of this one, and how their group is left."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import distributed

from d2l.errors import CheckpointError, D2LError, ProcessError
from d2l.train.ranks import process_name

T = TypeVar("T")

# How long a process waits for another one whose host has vanished without a word; NCCL's own default, for gloo too. One
# that ends is noticed within seconds: its connections close.
TIMEOUT = timedelta(minutes=10)


def processes() -> PartialState:
    """Return the process group of this run and the device of this process; the first call joins the group.

    On CPUs accelerate needs the option, or each of several processes acts as the only one.

    Raises:
        ProcessError: a machine has fewer GPUs than processes.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available())
    started, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not cpu and started > gpus:
        raise ProcessError(
            f"{started} processes were started on a machine with {gpus} GPU(s), and each needs one of its own: start "
            f"{gpus}, and set gradient_accumulation_steps to what the others would have done"
        )
    return PartialState(cpu=cpu, timeout=TIMEOUT)


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group of this run at the end, where it was joined meanwhile.

    In order all leave together. After an error, which is given the name of this process, the others notice within seconds
    that it is gone.

    Raises:
        ProcessError: another process is gone.
    """
    try:
        yield
        if distributed.is_initialized():
            processes().wait_for_everyone()
    except Exception as error:
        if not distributed.is_initialized():
            raise
        if is_of_connection(error):
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ProcessError(
                f"{process_name()} lost another process of the run, which ended, or whose host cannot be reached: the one "
                f"that ended first says why ({reason})"
            ) from error
        error.add_note(
            f"in {process_name()}" + ("" if isinstance(error, D2LError) else "; the other processes end too")
        )
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def is_of_connection(error: Exception) -> bool:
    """Return whether an error says that another process cannot be reached; gloo has no type of its own for it."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def require_agreement(parts: Mapping[str, str], what: str) -> None:
    """Refuse processes that differ, in all of them.

    Args:
        parts: values of this process by name.
        what: the values, in words.

    Raises:
        ProcessError: the message names the parts that differ, and the processes with another value than the first one.
    """
    if processes().num_processes == 1:
        return
    names, values = zip(*gather_object([(process_name(), dict(parts))]), strict=True)
    lines = []
    for part in dict.fromkeys(part for each in values for part in each):
        others = [name for name, each in zip(names, values, strict=True) if each.get(part) != values[0].get(part)]
        if others:
            found = next(each.get(part) for each in values if each.get(part) != values[0].get(part))
            lines.append(
                f"  {part}: expected {str(values[0].get(part))[:12]} of {names[0]}, found {str(found)[:12]} in "
                f"{', '.join(others)}"
            )
    if lines:
        raise ProcessError("\n".join([f"{what} of the processes differ; give all of them the same:", *lines]))


def from_main_process(decide: Callable[[], T]) -> T:
    """Return in every process what the main one decides; what it decides has to pickle.

    Raises:
        CheckpointError: in every process, where the main one refuses.
    """
    decided: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            decided = [decide(), None]
        except CheckpointError as error:
            decided = [None, str(error)]
    result, refusal = broadcast_object_list(decided)
    if refusal is not None:
        raise CheckpointError(refusal)
    return result


@dataclass(frozen=True)
class OneProcess:
    """Process group of one process on one device, whatever other processes there are; for the twin of the checks."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
