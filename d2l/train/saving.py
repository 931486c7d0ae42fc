"""Checkpoints written beside training: a step waits for the copy of its state, and one thread writes what was copied."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from d2l.checkpoint import Checkpoint, prune_checkpoints, take_snapshot, write_snapshot
from d2l.io.atomic import sync
from d2l.io.run_folder import METRICS, step_folder


class Saver:
    """Saves checkpoints of a run, one at a time. Each method raises, once, what the writer of the one before met.

    Args:
        folder: the run's, for this writer alone.
        keep: how many checkpoints stay; older ones are removed after each save.
        writer: has one thread.

    Raises:
        CheckpointError: that checkpoint could not be written.
        OSError: the metrics could not be, or an older checkpoint could not be removed.
    """

    def __init__(self, folder: Path, keep: int, writer: ThreadPoolExecutor) -> None:
        self._folder, self._keep, self._writer = folder, keep, writer
        self._in_flight: Future[None] | None = None

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Wait for the save in flight, copy the checkpoint of a step, and have it written."""
        self.settle(wait=True)  # before the copy: there is memory for one
        place = step_folder(self._folder, step)
        self._in_flight = self._writer.submit(self._write, place, take_snapshot(checkpoint))

    def settle(self, *, wait: bool) -> None:
        """Raise what the writer met, if it is done; else wait for it, or leave it to a later call."""
        if self._in_flight is not None and (wait or self._in_flight.done()):
            done, self._in_flight = self._in_flight, None
            done.result()

    def _write(self, place: Path, snapshot: Checkpoint) -> None:
        sync(self._folder / METRICS)  # a checkpoint's steps are in the file, whatever happens after it
        write_snapshot(place, snapshot)
        prune_checkpoints(self._folder, self._keep)


@contextmanager
def saver(folder: Path, keep: int) -> Iterator[Saver]:
    """Yield a run's `Saver`; at the end, also after an error, nothing is in flight any more.

    Raises:
        CheckpointError, OSError: as `Saver`; after another error, that one has it as a note.
    """
    with ThreadPoolExecutor(1, "checkpoint") as writer:
        made = Saver(folder, keep, writer)
        try:
            yield made
        except BaseException as error:
            try:
                made.settle(wait=True)
            except Exception as failure:
                error.add_note(str(failure))
            raise
        made.settle(wait=True)
