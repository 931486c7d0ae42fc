"""Libraries, free memory and disk of this machine, as a run would find them."""

import shutil
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from d2l.config.schema import RunConfig

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
