"""A limit of time for a check: one that hangs is ended by an alarm, and those after it run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 600.0  # the slowest check of gpt-oss-20b takes under 10 s on a laptop; the device stage reads real weights


class TimedOut(BaseException):
    """A check did not finish in time. No Exception: a check may catch those of what it examines."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the block after so many seconds of wall time; 0: never.

    Python delivers an alarm between two of its own instructions: a call into a library that never returns is not ended. In
    another thread than the main one, and where there are no alarms (Windows), there is no limit.
    """
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimedOut(f"did not finish within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
