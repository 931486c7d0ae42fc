"""Trackers: what they get, when, and that none of them ends a run; TensorBoard's own files where it is installed."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, MLflowTracker, WandBTracker
from support.tiny_model import random_rows, run_config, tiny_model

from d2l.config.schema import RunConfig
from d2l.errors import ConfigError, NonFiniteError
from d2l.train import trackers
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import MEASURED
from d2l.train.processes import processes
from d2l.train.trackers import require_trackers, started_trackers

IDENTITY = "5f0c" * 8


class Notebook(GeneralTracker):
    """A tracker that keeps what it is given, and fails where it is told to."""

    name, requires_logging_directory = "notebook", False
    made: ClassVar[list["Notebook"]] = []
    fails: ClassVar[dict[str, int]] = {}  # method → the step from which on it raises

    def __init__(self, run: str, **settings: Any) -> None:
        super().__init__()
        self.run, self.settings, self.events = run, settings, list[Any]()
        Notebook.made.append(self)

    @property
    def tracker(self) -> "Notebook":
        return self

    def _note(self, method: str, value: Any, step: int = 0) -> None:
        if step >= self.fails.get(method, 10**9):
            raise OSError(f"{method} met a full disk")
        self.events.append((method, step, value))

    def start(self) -> None:
        self._note("start", None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("store", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("log", values, step or 0)

    def finish(self) -> None:
        self._note("finish", None)

    def steps(self) -> list[int]:
        return [step for method, step, _ in self.events if method == "log"]


@pytest.fixture(autouse=True)
def notebooks(monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    """Notebooks in the place of TensorBoard and wandb."""
    processes()
    monkeypatch.setattr(Notebook, "made", [])
    monkeypatch.setattr(Notebook, "fails", {})
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Notebook)
    return Notebook.made


def train(config: RunConfig, folder: Path, step: int = 0) -> list[dict[str, float]]:
    trainer = Trainer(
        tiny_model(config, num_hidden_layers=2, layer_types=["full_attention"] * 2), random_rows(), config
    )
    records = []
    with started_trackers(config, folder, IDENTITY, step) as track:
        for metrics in train_steps(trainer, folder):
            records.append(metrics.to_json())
            track(records[-1])
    return records


def test_every_tracker_gets_the_settings_and_every_so_many_steps_and_the_last(
    tmp_path: Path, notebooks: list[Notebook]
) -> None:
    config = run_config(max_steps=5, logging_steps=2, report_to=("tensorboard", "wandb"))
    records = train(config, tmp_path)
    first, second = notebooks
    assert (first.run, first.settings) == ("tensorboard", {"logging_dir": tmp_path, "purge_step": None})
    run = {"name": tmp_path.name, "id": IDENTITY, "resume": "allow"}
    assert (second.run, second.settings) == ("d2l", {"dir": str(tmp_path), **run})
    for notebook in notebooks:
        assert [method for method, _, _ in notebook.events] == ["start", "store", *["log"] * 3, "finish"]
        assert notebook.steps() == [2, 4, 5]
        settings = notebook.events[1][2]
        assert settings["learning_rate"] == config.learning_rate
        assert settings["target_modules"] == "['o_proj', 'q_proj']"
        assert all(type(value) in (bool, int, float, str) for value in settings.values())
        expected = [{key: value for key, value in records[step - 1].items() if key != "step"} for step in (2, 4, 5)]
        assert [values for method, _, values in notebook.events if method == "log"] == expected


def test_an_evaluated_step_is_reported_whatever_its_number(tmp_path: Path, notebooks: list[Notebook]) -> None:
    config = run_config(max_steps=9, logging_steps=4, report_to=("tensorboard",))
    with started_trackers(config, tmp_path, IDENTITY, 0) as track:
        for step in range(1, 8):
            track({"step": step, "ce_loss": 1.0} | ({"eval/lora_distance": 0.5} if step == 6 else {}))
    assert notebooks[0].steps() == [4, 6]
    logged = [values for method, _, values in notebooks[0].events if method == "log"]
    assert logged == [{"ce_loss": 1.0}, {"ce_loss": 1.0, "eval/lora_distance": 0.5}]


@pytest.mark.parametrize(("method", "step", "kept"), [("log", 2, [1]), ("store", 0, []), ("finish", 0, [1, 2, 3])])
def test_a_tracker_that_fails_is_left_out_with_one_warning_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebooks: list[Notebook], method: str, step: int, kept: list[int]
) -> None:
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    alone.mkdir()
    watched.mkdir()
    expected = train(run_config(max_steps=3), alone)
    monkeypatch.setitem(Notebook.fails, method, step)
    with pytest.warns(UserWarning, match=f"notebook failed.*{method} met a full disk") as caught:
        records = train(run_config(max_steps=3, report_to=("tensorboard",)), watched)
    assert len(caught) == 1
    assert [notebook.steps() for notebook in notebooks] == [kept]
    for ours, theirs in zip(records, expected, strict=True):
        assert {**ours, **dict.fromkeys(MEASURED)} == {**theirs, **dict.fromkeys(MEASURED)}


def test_the_others_go_on_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebooks: list[Notebook]
) -> None:
    def full(self: Notebook, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise OSError("full")

    broken = type("Broken", (Notebook,), {"log": full})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", broken)
    with pytest.warns(UserWarning, match="OSError: full"):
        train(run_config(max_steps=2, report_to=("wandb", "tensorboard")), tmp_path)
    assert [(type(notebook).__name__, notebook.steps()) for notebook in notebooks] == [
        ("Broken", []),
        ("Notebook", [1, 2]),
    ]


def test_trackers_are_finished_when_a_run_stops_on_an_error(tmp_path: Path, notebooks: list[Notebook]) -> None:
    with pytest.raises(NonFiniteError), started_trackers(run_config(report_to=("wandb",)), tmp_path, IDENTITY, 0):
        raise NonFiniteError("step 3")
    assert notebooks[0].events[-1][0] == "finish"


def test_a_tracker_that_does_not_start_is_a_refusal_and_the_started_ones_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebooks: list[Notebook]
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", type("Shut", (Notebook,), {"fails": {"start": 0}}))
    config = run_config(report_to=("tensorboard", "wandb"))
    with (
        pytest.raises(ConfigError, match="report_to: wandb does not start: OSError: start met a full disk"),
        started_trackers(config, tmp_path, IDENTITY, 0),
    ):
        pass
    assert [method for method, _, _ in notebooks[0].events] == ["start", "finish"]


def test_only_the_main_process_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebooks: list[Notebook]
) -> None:
    monkeypatch.setattr(trackers, "processes", lambda: type("Other", (), {"is_main_process": False}))
    train(run_config(max_steps=1, report_to=("wandb",)), tmp_path)
    assert notebooks == []


class FakeMlflow(ModuleType):
    """A server of MLflow: it draws the ids of runs, knows no others, and lets no parameter change."""

    utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs, self.metrics = dict[str, Any](), list[tuple[str, int]]()

    def search_experiments(self, filter_string: str) -> list[Any]:
        return [SimpleNamespace(experiment_id="7")]

    def search_runs(self, *, filter_string: str, **settings: Any) -> list[Any]:
        assert settings == {"search_all_experiments": True, "max_results": 1, "output_format": "list"}
        wanted = dict([filter_string.removeprefix("tags.").replace("'", "").split(" = ")])
        return [run for run in self.runs.values() if wanted.items() <= run.data.tags.items()][:1]

    def start_run(self, *, run_id: str | None, run_name: str, **settings: Any) -> Any:
        new = SimpleNamespace(
            info=SimpleNamespace(run_id=f"drawn-{len(self.runs)}", run_name=run_name),
            data=SimpleNamespace(tags={}, params={}),
        )
        self.active = self.runs[run_id] if run_id else self.runs.setdefault(new.info.run_id, new)
        return self.active

    def set_tag(self, key: str, value: str) -> None:
        self.active.data.tags[key] = value

    def log_params(self, values: dict[str, Any]) -> None:
        params = self.active.data.params
        changed = [key for key in values if params.get(key, values[key]) != values[key]]
        assert not changed, "Changing param values is not allowed"
        params.update(values)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics.append((self.active.info.run_id, step))

    def end_run(self) -> None:
        del self.active


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    """A server under accelerate's own class."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", MLflowTracker)
    monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow())
    return sys.modules["mlflow"]  # type: ignore[return-value]


def track_one(folder: Path, identity: str, step: int, **changes: Any) -> None:
    """Start the trackers of a run after a step, and hand them the next one."""
    with started_trackers(run_config(**changes), folder, identity, step) as track:
        track({"step": step + 1, "ce_loss": 1.0})


def test_a_resumed_run_goes_on_in_its_run_in_mlflow_which_keeps_the_settings_of_its_start(
    tmp_path: Path, mlflow: FakeMlflow
) -> None:
    track_one(tmp_path, "a" * 32, 0, max_steps=5, report_to=("mlflow",))
    track_one(tmp_path, "b" * 32, 0, max_steps=6, report_to=("mlflow",))
    track_one(tmp_path, "a" * 32, 1, max_steps=9, report_to=("mlflow",))
    assert mlflow.metrics == [("drawn-0", 1), ("drawn-1", 1), ("drawn-0", 2)]
    assert [run.data.params["max_steps"] for run in mlflow.runs.values()] == [5, 6]
    assert {run.info.run_name for run in mlflow.runs.values()} == {tmp_path.name}


def test_mlflow_takes_the_run_that_its_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMlflow
) -> None:
    theirs = mlflow.start_run(run_id=None, run_name="theirs")
    theirs.data.params["max_steps"] = 5
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.info.run_id)
    track_one(tmp_path, IDENTITY, 0, max_steps=6, report_to=("mlflow",))
    monkeypatch.delenv("MLFLOW_RUN_ID")
    track_one(tmp_path, IDENTITY, 1, max_steps=6, report_to=("mlflow",))
    assert mlflow.metrics == [("drawn-0", 1), ("drawn-0", 2)]
    assert theirs.data.params["max_steps"] == 5
    assert theirs.data.params["lora_r"] == run_config().lora_r


def test_a_server_of_mlflow_that_is_down_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMlflow
) -> None:
    def down(**settings: Any) -> list[Any]:
        raise ConnectionError("max retries exceeded")

    monkeypatch.setattr(mlflow, "search_runs", down)
    with pytest.raises(ConfigError, match="report_to: mlflow does not start: ConnectionError: max retries exceeded"):
        track_one(tmp_path, IDENTITY, 0, report_to=("mlflow",))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"id": IDENTITY, "resume": "allow"}),
        ({"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}, {"id": "mine", "resume": "must"}),
    ],
)
def test_wandb_is_started_with_the_id_of_the_run_or_that_of_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, str]
) -> None:
    started: list[dict[str, Any]] = []
    ignore: Callable[..., None] = lambda *values, **settings: None  # noqa: E731 - one for three methods
    run = SimpleNamespace(log=ignore, finish=ignore)
    wandb = SimpleNamespace(
        init=lambda **settings: started.append(settings) or run, config=SimpleNamespace(update=ignore)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", WandBTracker)
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for step in (0, 1):
        track_one(tmp_path, IDENTITY, step, report_to=("wandb",))
    assert started == [{"project": "d2l", "dir": str(tmp_path), "name": tmp_path.name, **expected}] * 2


def test_trackers_that_are_not_installed_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["mlflow"])
    require_trackers(())
    require_trackers(("mlflow",))
    with pytest.raises(ConfigError, match=r"expected installed trackers, wandb, trackio is not; `pip install wandb"):
        require_trackers(("mlflow", "wandb", "trackio"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("none", ()), ("wandb", ("wandb",)), ([], ()), (["wandb", "tensorboard", "wandb"], ("wandb", "tensorboard"))],
)
def test_report_to_as_training_arguments_write_it(value: Any, expected: tuple[str, ...]) -> None:
    assert RunConfig(report_to=value).report_to == expected


def test_tensorboard_reads_back_what_the_run_wrote_and_steps_taken_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", TensorBoardTracker)
    require_trackers(("tensorboard",))
    config = run_config(max_steps=3, report_to=("tensorboard",))
    records = train(config, tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {*records[0]} - {"step"} <= {*read.Tags()["scalars"]}
    for key in {*records[0]} - {"step"}:
        values = read.Scalars(key)
        assert [value.step for value in values] == [1, 2, 3]
        assert [value.value for value in values] == pytest.approx([record[key] for record in records], rel=1e-6)
    with started_trackers(
        config, tmp_path, IDENTITY, 1
    ) as track:  # continued from step 1: steps 2 and 3 are taken again
        track(records[1] | {"lr": 0.5})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(value.step, value.value) for value in read.Scalars("lr")] == [
        (1, pytest.approx(records[0]["lr"])),
        (2, 0.5),
    ]
