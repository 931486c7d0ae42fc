"""Training run: its components, its folder and the training loop, for a configuration that passed preflight."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.tokenize import OnProgress
from d2l.errors import CheckpointError, NonFiniteError
from d2l.train.events import FAILED, STOPPED, note_event
from d2l.train.first_step import FIRST_STEP, UNKNOWN, Prediction
from d2l.train.folder import named_writes, prepare
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import StepMetrics, forget_peak_memory
from d2l.train.processes import processes
from d2l.train.start import Start
from d2l.train.stopping import StopRequest
from d2l.train.trackers import started_trackers
from d2l.train.watch import Watch


def train(
    config: RunConfig,
    start: Start,
    *,
    preflight: Mapping[str, Any],
    prediction: Prediction = UNKNOWN,
    on_step: Callable[[Mapping[str, float]], None],
    on_tokenize: OnProgress = lambda done, total: None,
    stop: StopRequest | None = None,
) -> str | None:
    """Train in a run's folder to the configured number of steps.

    Args:
        start: a new folder, or the checkpoint that is resumed in the folder of its run.
        preflight: report of the preflight as JSON values, kept in the folder.
        prediction: what that report says of the run's steps; checkpoints keep it beside the first step.
        on_step: called after every step with its metrics, as in metrics.jsonl, and the evaluation after it, under `eval/`.
        on_tokenize: called while the data is tokenized, with the number of records done, and of all.
        stop: the run stops, saved, at the end of the step in which this is made; in several processes, if it is in one.

    Returns:
        None where all steps are taken, else what it was stopped by.

    Raises:
        CheckpointError: the folder cannot be written: the disk is full, or worse; the newest checkpoint stands.
        D2LError: see `d2l.build` and `d2l.train.loop.train_steps`.
    """
    this = processes()  # before the base is loaded: gives each process a GPU of its own
    forget_peak_memory(this.device)
    components = Components(config, on_tokenize, processes=this.num_processes)
    rows = components.rows  # before the base is loaded: errors in the data should come first
    heldout = components.heldout
    trainer = Trainer(components.model, rows, config, stop=stop)
    if start.checkpoint is not None:
        trainer.restore(start.checkpoint)
    if this.is_main_process:
        with _named_writes(start.folder):
            prepare(start.folder, config, start.identity, preflight, None if start.checkpoint is None else start.step)
            if start.checkpoint is not None:
                note_event(start.folder, f"resumed after step {start.step:,}")
    this.wait_for_everyone()
    evidence = {"fingerprint": preflight["fingerprint"], "preflight": preflight["summary"], **start.evidence()}
    sources = [record.source for record in components.records]
    kept = None if start.checkpoint is None else start.checkpoint.state.get(FIRST_STEP)
    watch = Watch(trainer, start.folder, heldout, sources, prediction, kept)
    taken = closing(_take_steps(trainer, start.folder, watch, evidence))  # closed: nothing is being saved any more
    tracked = started_trackers(config, start.folder, start.identity.id, trainer.step_number)
    with tracked as track, _noted_failure(start.folder, trainer), taken as steps:
        for metrics in steps:
            record = metrics.to_json() | watch.evaluation
            track(record)
            on_step(record)
    if trainer.step_number >= config.max_steps:
        return None
    if this.is_main_process:
        with _named_writes(start.folder):
            note_event(start.folder, f"{STOPPED} {trainer.step_number:,} by {trainer.stop.cause}")
    return trainer.stop.cause


@contextmanager
def _noted_failure(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Note in the run's folder what has ended it; values that are not finite have an autopsy of their own."""
    try:
        yield
    except NonFiniteError:
        raise
    except Exception as error:
        if processes().is_main_process:
            with suppress(OSError, CheckpointError):  # the folder may be what failed
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                note_event(folder, f"{FAILED} {trainer.step_number:,}: {what}")
        raise


def _take_steps(
    trainer: Trainer, folder: Path, watch: Watch, evidence: Mapping[str, Any]
) -> Generator[StepMetrics, None, None]:
    """Take the steps; what the operating system refuses meanwhile is about the folder."""
    with _named_writes(folder):
        yield from train_steps(trainer, folder, watch, **evidence)


def _named_writes(folder: Path) -> AbstractContextManager[None]:
    return named_writes(folder, f"make room there, then continue with --resume {folder}")
