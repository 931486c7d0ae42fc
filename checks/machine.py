"""Libraries, processes, free memory and disk of this machine, and how fast that is, as a run would find them."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from d2l.checkpoint import Checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.io.atomic import scratch_folder

DISTRIBUTION = "d2l-preflight"


def requirements() -> dict[str, str]:
    """Return what the installed distribution needs → the version that is installed, empty where it is absent.

    Extras and requirements of other platforms are left out. Nothing is returned for a checkout that is not installed.
    """
    try:
        needed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return {}
    return {str(it): _installed(it.name) for it in needed if it.marker is None or it.marker.evaluate({"extra": ""})}


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def started_processes() -> int:
    """Return how many processes the launcher started; without a launcher one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpu() -> str | None:
    """Return the GPU that a run would use, as torch names it; None without one."""
    return "cuda" if torch.cuda.is_available() else None


def free_memory() -> int | None:
    """Return the bytes of the GPU that a run can have, those that this process keeps for itself included; None without one."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def peak_memory(work: Callable[[], object]) -> int | None:
    """Do something, and return the most bytes of the GPU that tensors took meanwhile; None without one."""
    if not torch.cuda.is_available():
        work()
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def free_disk(config: RunConfig) -> int:
    """Return the free bytes where the run's folder would be."""
    return shutil.disk_usage(_output_place(config)).free


def save_seconds(config: RunConfig, size: int) -> float:
    """Save a checkpoint of so many bytes where the run's folder would be, remove it, and return what saving it took.

    Raises:
        OSError: nothing can be written there.
        CheckpointError: it cannot be written to the end.
    """
    weights = torch.rand(size // 4)  # float32; random, or a disk might compress it
    with scratch_folder(_output_place(config) / "save") as folder:
        started = time.perf_counter()
        save_checkpoint(folder / "step-000000", Checkpoint({"weights": weights}, {}, {}))
        return time.perf_counter() - started


def _output_place(config: RunConfig) -> Path:
    """Return the run's folder, or the nearest one above it that exists."""
    folder = Path(config.output_dir).absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
