"""Random state of this process, as tensors that a checkpoint or an autopsy can hold."""

from collections.abc import Mapping

import torch
from torch import Tensor

_CPU, _CUDA = "rng.torch", "rng.cuda"


def random_state() -> dict[str, Tensor]:
    """Return the states of the generators of the CPU and, where there is one, of this process's GPU."""
    state = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        state[_CUDA] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Set the generators to a state of `random_state`; other tensors in the mapping are left alone."""
    torch.set_rng_state(state[_CPU])
    if _CUDA in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[_CUDA])
