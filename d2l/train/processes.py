"""Processes that share each optimizer step, and the device of this one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from d2l.errors import CheckpointError

T = TypeVar("T")


def processes() -> PartialState:
    """Return the process group of this run and the device of this process; the first call joins the group.

    On CPUs accelerate needs the option, or each of several processes acts as the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))


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
