"""The processes that share each optimizer step, and the device of this one."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """The processes of this run, which the first call joins, and the device of this one.

    On CPUs accelerate has to be told, or each of several processes takes itself for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))


@dataclass(frozen=True)
class OneProcess:
    """A process that trains by itself on a device of its own, whatever others there are; a twin does."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
