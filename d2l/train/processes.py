"""Processes that share each optimizer step, and the device of this one."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return the process group of this run and the device of this process; the first call joins the group.

    On CPUs accelerate needs the option, or each of several processes acts as the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))


@dataclass(frozen=True)
class OneProcess:
    """Process group of one process on one device, whatever other processes there are; for the twin of the checks."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
