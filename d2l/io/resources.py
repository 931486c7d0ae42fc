"""Paths of the shipped configs, models and chat templates, in a checkout and in an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def resource(name: str) -> Path:
    """Return the path of a shipped file or folder.

    Args:
        name: relative path with forward slashes, such as `configs/tiny_gpt_oss.yaml`.

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    for root in (_PACKAGE / "resources", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is not shipped with d2l")


def local_or_shipped(name: str) -> Path | None:
    """Return the local path of that name, else the shipped one (`configs/models/tiny_gpt_oss` in any directory), else `None`."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    try:
        return resource(path.as_posix())
    except FileNotFoundError:
        return None
