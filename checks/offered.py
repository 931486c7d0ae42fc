"""What an implementation, its model or its trainer has; asking for anything else is `NotOffered`."""

from typing import Any

from checks.result import NotOffered


class Offered:
    """An implementation whose missing methods raise `NotOffered`."""

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        if (found := getattr(self._implementation, name, None)) is None:
            raise NotOffered(name)
        return found


def offered(part: Any, name: str) -> Any:
    """Return an attribute of a model or a stepper.

    Raises:
        NotOffered: it has none of that name.
    """
    if (found := getattr(part, name, None)) is None:
        raise NotOffered(f"{name} of its {'model' if hasattr(part, 'hypernet') else 'trainer'}")
    return found
