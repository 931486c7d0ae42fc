"""Trackers that a run reports to: accelerate's own, started with the run; one that fails is left out, the run goes on."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any
from warnings import warn

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from d2l.config.schema import RunConfig, TrackerName
from d2l.errors import ConfigError
from d2l.train.metrics import EVALUATED
from d2l.train.processes import processes

PROJECT = "d2l"
RUN_TAG = "d2l_run"  # in MLflow, which draws the ids of its runs itself

Track = Callable[[Mapping[str, float]], None]


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: with all of them.
    """
    installed = {str(name) for name in get_available_trackers()}
    absent = [name for name in names if name not in installed]
    if absent:
        raise ConfigError(
            [
                f"report_to: expected installed trackers, {', '.join(absent)} is not; `pip install {' '.join(absent)}`, "
                "or leave it out: metrics.jsonl in the run's folder has every step anyway"
            ]
        )


@contextmanager
def started_trackers(config: RunConfig, folder: Path, identity: str, step: int) -> Iterator[Track]:
    """Start the run's trackers and yield a function that hands them a step's metrics.

    They get every step that is a multiple of `logging_steps`, or evaluated, or the last.

    The main process reports; in the others the function does nothing. A tracker that fails after its start is left out
    with one warning.

    Args:
        folder: the run's folder, whose name is the run's in every tracker; TensorBoard's files lie in it.
        identity: the run's id, under which a resumed run goes on in the trackers' own one.
        step: the step that the run continues from; 0 for a new one.

    Raises:
        ConfigError: a tracker does not start.
    """
    running: list[GeneralTracker] = []

    def each(use: Callable[[GeneralTracker], None]) -> None:
        for tracker in tuple(running):
            try:
                use(tracker)
            except Exception as error:  # whatever a tracker raises, a run of days is worth more
                running.remove(tracker)
                reason = shorten(f"{type(error).__name__}: {error}", width=300)
                warn(f"the tracker {tracker.name} failed and is left out from now on: {reason}", stacklevel=3)

    def track(record: Mapping[str, float]) -> None:
        evaluated = any(key.startswith(EVALUATED) for key in record)
        if evaluated or record["step"] % config.logging_steps == 0 or record["step"] == config.max_steps:
            values = {key: value for key, value in record.items() if key != "step"}
            each(lambda tracker: tracker.log(values, step=int(record["step"])))

    try:
        for name in config.report_to if processes().is_main_process else ():
            running.append(_start(name, folder, identity, step))
        settings = _flat(config)
        each(lambda tracker: tracker.store_init_configuration(_without_known(tracker, settings)))
        yield track
    finally:
        each(lambda tracker: tracker.finish())


def _start(name: TrackerName, folder: Path, identity: str, step: int) -> GeneralTracker:
    """Start one tracker, each as its environment says first: without a network (`WANDB_MODE=offline`), in another run."""
    try:
        first, others = _arguments(name, folder, identity, step)
        tracker = LOGGER_TYPE_TO_CLASS[name](first, **others)
        tracker.start()
        if name == "mlflow":
            import_module("mlflow").set_tag(RUN_TAG, identity)
    except Exception as error:  # no login, no network, a full disk: each library raises what it likes
        reason = shorten(f"{type(error).__name__}: {error}", width=300)
        raise ConfigError([f"report_to: {name} does not start: {reason}; mend it, or leave {name} out"]) from error
    return tracker


def _arguments(name: TrackerName, folder: Path, identity: str, step: int) -> tuple[str, dict[str, Any]]:
    """Return what accelerate's class of a tracker is made with."""
    run = folder.resolve().name
    match name:
        case "tensorboard":  # events of steps that are taken again are purged
            return "tensorboard", {"logging_dir": folder, "purge_step": step + 1 if step else None}
        case "wandb":  # what is given here would win over its environment
            own = {"id": os.environ.get("WANDB_RUN_ID", identity), "resume": os.environ.get("WANDB_RESUME", "allow")}
            return os.environ.get("WANDB_PROJECT", PROJECT), {"dir": str(folder), "name": run, **own}
        case "trackio":
            return os.environ.get("TRACKIO_PROJECT", PROJECT), {"name": run, "resume": "allow"}
        case "mlflow":
            return PROJECT, {"run_name": run, "run_id": _mlflow_run(identity)}


def _mlflow_run(identity: str) -> str | None:
    """Return the id of the newest run in MLflow that has the tag of this one and is not deleted."""
    found = import_module("mlflow").search_runs(
        filter_string=f"tags.{RUN_TAG} = '{identity}'", search_all_experiments=True, max_results=1, output_format="list"
    )
    return str(found[0].info.run_id) if found else None


def _without_known(tracker: GeneralTracker, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those of an MLflow run that goes on: it keeps its first ones, and refuses others."""
    known = tracker.tracker.data.params if tracker.name == "mlflow" else {}
    return {key: value for key, value in settings.items() if key not in known}


def _flat(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Return the configuration with values that every tracker takes: numbers and text."""
    values = config.resolved().items()
    return {key: value if isinstance(value, bool | int | float) else str(value) for key, value in values}
