"""The model hub: what is in the cache first, and no waiting for a network that is not there."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
PATIENCE = 3.0  # seconds for the one request that tells whether the hub answers; libraries retry for a minute


def from_cache_or_hub(load: Callable[[bool], T], name: str) -> T:
    """What `load(local_files_only)` gives: from the cache, else from the hub where it answers.

    Raises:
        OSError: neither has it. `load` may raise errors of its own.
    """
    try:
        return load(True)
    except OSError as error:
        if not hub_answers(name):
            raise OSError(f"{name} is not in the cache, and the hub cannot be reached") from error
    return load(False)


@cache
def hub_answers(name: str) -> bool:
    """Whether the hub says anything about a repository, be it that there is none."""
    if HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except Exception:  # whatever the network library in use raises: all of it means no answer
        return False
    return True
