"""Access to the model hub: the local cache comes first, and a hub that cannot be reached costs seconds, not minutes."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
TIMEOUT = 3.0  # seconds for the one request that tests whether the hub answers; libraries retry for a minute


def from_cache_or_hub(load: Callable[[bool], T], name: str) -> T:
    """Return the result of `load(local_files_only)`: from the cache, else from the hub if it answers.

    Raises:
        OSError: neither has `name`. `load` may raise errors of its own.
    """
    try:
        return load(True)
    except OSError as error:
        if not hub_answers(name):
            raise OSError(f"{name} is not in the cache, and the hub cannot be reached") from error
    return load(False)


@cache
def hub_answers(name: str) -> bool:
    """Return whether the hub answers a request for a repository, even with an error such as not found."""
    if HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except HfHubHTTPError:
        return True
    except Exception:  # whatever the network library in use raises: all of it means no answer
        return False
    return True
