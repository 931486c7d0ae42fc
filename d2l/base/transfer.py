"""Copies from the host to a device that make nobody wait."""

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without a wait of the host for the work queued on a GPU.

    A copy from pageable memory waits for all that is queued; one from pinned memory is queued itself. PyTorch gives a
    pinned block to another tensor only after the copies out of it have run.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
