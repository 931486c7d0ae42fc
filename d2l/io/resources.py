"""Where the shipped configs, models and chat templates lie, from a checkout and from an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def resource(name: str) -> Path:
    """The path of a shipped file or folder.

    Args:
        name: relative and with forward slashes, such as `configs/tiny_gpt_oss.yaml`.

    Raises:
        FileNotFoundError: nothing of that name is shipped.
    """
    for root in (_PACKAGE / "resources", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is not shipped with d2l")


def local_or_shipped(name: str) -> Path | None:
    """The local path of that name, else the shipped one (`configs/models/tiny_gpt_oss` from any directory), else `None`."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    try:
        return resource(path.as_posix())
    except FileNotFoundError:
        return None
