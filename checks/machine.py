"""Free memory and disk of this machine, as a run would find them."""

import shutil
from pathlib import Path

import torch

from d2l.config.schema import RunConfig


def gpu() -> str | None:
    """Return the GPU that a run would use, as torch names it; None without one."""
    return "cuda" if torch.cuda.is_available() else None


def free_memory() -> int | None:
    """Return the free bytes of the GPU; None without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def free_disk(config: RunConfig) -> int:
    """Return the free bytes where the run's folder would be."""
    folder = Path(config.output_dir).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
