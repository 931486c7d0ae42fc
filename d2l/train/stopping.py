"""Requests to stop a run, by a signal or a limit of time: a handler only sets a flag, which the training loop reads."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# torchrun passes on what it gets, and Slurm signals both: a process under a launcher gets one request twice.
_REPEATED_WITHIN = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop when it had nothing to save; the message says by what."""


class StopRequest:
    """A request to stop, made at most once.

    Args:
        minutes: make it by itself so long after now.
        announce: called once, with a line for the user, from the signal's handler: it may not print through a buffer.
    """

    def __init__(self, minutes: float | None = None, announce: Callable[[str], None] = lambda text: None) -> None:
        self._minutes = minutes
        self._until = math.inf if minutes is None else time.perf_counter() + 60 * minutes
        self._announce = announce
        self._signal: signal.Signals | None = None
        self._received = 0.0
        self._waits = False

    @property
    def is_made(self) -> bool:
        """Whether the run should stop."""
        return self._signal is not None or time.perf_counter() >= self._until

    @property
    def cause(self) -> str:
        """What made the request, in words."""
        if self._signal is not None:
            return self._signal.name
        return f"--max-minutes {self._minutes:g}" if self.is_made else "a request to another process"

    def wait_for_step(self) -> None:
        """Let later signals wait for the end of a step: now there is something to save. Before, they end the run at once."""
        self._waits = True

    def receive(self, number: int) -> None:
        """Take a signal; a second one ends the process, by that signal's own action.

        Raises:
            Interrupted: there is nothing to save yet.
        """
        if self._signal is not None:
            launched = "TORCHELASTIC_RUN_ID" in os.environ
            if not (launched and number == self._signal and time.monotonic() - self._received < _REPEATED_WITHIN):
                _end_by(number)
            return
        self._signal, self._received = signal.Signals(number), time.monotonic()
        if not self._waits:
            raise Interrupted(self.cause)
        self._announce(f"{self.cause}: stopping at the end of this step; a second signal stops at once")


@contextmanager
def stop_on_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Hand SIGTERM, SIGUSR1 and SIGINT to a function meanwhile, by number; afterwards they do what they did.

    Signals that are ignored stay so (`nohup`, `&`). Python takes signals in the main thread alone: in another one nothing
    is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker of the preflight
            _end_by(number)
        receive(number)

    before = {it: signal.getsignal(it) for it in SIGNALS}
    taken = {it: handler for it, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for it in taken:
            signal.signal(it, handle)
        yield
    finally:
        for it, handler in taken.items():
            signal.signal(it, signal.SIG_DFL if handler is None else handler)  # None: not set by Python


def _end_by(number: int) -> None:
    """End this process as the signal does by itself: a shell sees 128 + its number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
