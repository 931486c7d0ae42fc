"""Who tells a refusal that several processes of a run meet: rank 0 tells its own, another one what rank 0 does not say."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import typer

from d2l.train.ranks import are_several, is_first, process_name
from d2l.train.stopping import stop_on_signals

if TYPE_CHECKING:
    from torch.distributed import Store

# seconds that a process waits for another one to meet the same: they read the same files at about the same time
PATIENCE = 10.0
_KEY = "refusal"


def tell_refusal(refusal: str, notes: Sequence[str] = ()) -> None:
    """Print a refusal on stderr, in one of the processes that meet it; one that meets another one names itself.

    Args:
        refusal: the message, by which processes meet the same.
        notes: lines below it.
    """
    if are_several() and not is_first():
        if _is_told_by_rank_0(refusal):
            return
        named = process_name() in "\n".join([refusal, *notes])
        notes = notes if named else [*notes, f"in {process_name()}"]
    typer.echo("\n".join([f"Error: {refusal}", *notes]), err=True)
    if are_several() and is_first() and _has_loaded():
        with suppress(RuntimeError):  # the launcher is gone
            if (store := _shared_store()) is not None:
                store.set(_KEY, refusal)


def _is_told_by_rank_0(refusal: str) -> bool:
    """Return whether rank 0 prints the same refusal, after waiting for it; False where nobody can be asked."""
    if not _has_loaded():
        return os.environ.get("LOCAL_RANK", "0") != "0" and _is_stopped()
    if refusal.startswith(process_name()):
        return False
    # A launcher that sees another process end stops this one, which has something to say.
    with suppress(KeyboardInterrupt, RuntimeError), stop_on_signals(_end_waiting):
        store, until = _shared_store(), time.monotonic() + PATIENCE
        while store is not None and time.monotonic() < until:
            if store.check([_KEY]):
                return bool(store.get(_KEY).decode() == refusal)
            time.sleep(0.05)
    return False


def _is_stopped() -> bool:
    """Wait to be stopped, as a launcher does once the first process of this host has told and ended; False where none does.

    All that was read are arguments and files, and that process read the same. Ending before it would have the launcher stop
    it instead, before it has told.
    """
    with suppress(KeyboardInterrupt), stop_on_signals(_end_waiting):
        time.sleep(PATIENCE)
        return False
    return True


def _has_loaded() -> bool:
    """Return whether this process came as far as its libraries, so that it may have met something of its own."""
    return "torch" in sys.modules


def _shared_store() -> "Store | None":
    """Connect to the store of torchrun's agent, which outlives the processes; None under a launcher without one.

    Raises:
        RuntimeError: it cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    return PrefixStore(f"d2l/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _end_waiting(number: int) -> NoReturn:
    raise KeyboardInterrupt
