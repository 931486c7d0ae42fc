"""Which of several processes of a run this is, as its launcher's environment says; read without torch."""

import os
import socket


def is_first() -> bool:
    """Return whether this process speaks for all: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def are_several() -> bool:
    """Return whether a launcher started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def process_name() -> str:
    """Return which of several processes this is, and on which host."""
    return f"rank {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)} on {socket.gethostname()}"
