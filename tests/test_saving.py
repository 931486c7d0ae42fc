"""Checkpoints beside training: what is written is the state as it was, one at a time, and nothing escapes the loop."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.tiny_model import random_rows, run_config, tiny_model

from d2l.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError, NonFiniteError
from d2l.io.run_folder import METRICS, step_folder, step_folders, step_of
from d2l.train import saving
from d2l.train.loop import Trainer, train_steps
from d2l.train.run import train
from d2l.train.saving import saver
from d2l.train.start import start_new
from d2l.train.stopping import StopRequest

PATIENCE = 20.0  # seconds, of a test that would otherwise hang


class Gate:
    """Holds the writer of a step's checkpoint until it is opened; `reached` when it stands before it."""

    def __init__(self, step: int) -> None:
        self.step, self.reached, self._open = step, threading.Event(), threading.Event()
        self.in_time = True
        self.written: list[int | None] = []

    def open(self) -> None:
        self._open.set()

    def around(self, write: Callable[[Path, Checkpoint], None]) -> Callable[[Path, Checkpoint], None]:
        def held(folder: Path, snapshot: Checkpoint) -> None:
            if step_of(folder) == self.step:
                self.reached.set()
                self.in_time = self._open.wait(PATIENCE)
            write(folder, snapshot)
            self.written.append(step_of(folder))

        return held


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before the checkpoint of step 2."""
    made = Gate(2)
    monkeypatch.setattr(saving, "write_snapshot", made.around(saving.write_snapshot))
    yield made
    assert made.in_time, "a step waited for the writer"


def trainer(stop: StopRequest | None = None, **changes: int) -> Trainer:
    config = run_config(**changes)
    return Trainer(tiny_model(config), random_rows(), config, stop=stop)


def saved(folder: Path) -> list[int | None]:
    return [step_of(it) for it in step_folders(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# One save


def test_what_is_written_is_the_state_when_it_was_handed_over(tmp_path: Path, gate: Gate) -> None:
    run = trainer()
    run.step()
    run.step()
    save_checkpoint(tmp_path / "expected", run.checkpoint(note=["kept"]))
    (tmp_path / METRICS).touch()
    note = ["kept"]
    with saver(tmp_path, keep=2) as writer:
        writer.save(2, run.checkpoint(note=note))
        run.step()
        note.append("later")
        gate.open()
    assert contents(step_folder(tmp_path, 2)) == contents(tmp_path / "expected")


def test_one_is_in_flight_and_the_next_one_waits(tmp_path: Path, gate: Gate) -> None:
    (tmp_path / METRICS).touch()
    made = Checkpoint({"w": torch.ones(3)}, {}, {})
    threads = set[str]()
    with saver(tmp_path, keep=1) as writer:
        writer.save(2, made)
        assert gate.reached.wait(PATIENCE)
        threads |= {it.name for it in threading.enumerate() if it.name.startswith("checkpoint")}
        writer.settle(wait=False)  # nothing is done yet, and nothing is waited for
        threading.Timer(0.02, gate.open).start()
        writer.save(3, made)
        assert gate.written[:1] == [2]
        writer.settle(wait=True)
        assert saved(tmp_path) == [3]
    assert threads == {"checkpoint_0"}
    assert not any(it.name.startswith("checkpoint") for it in threading.enumerate())


# The loop


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, gate: Gate) -> None:
    seen = []
    for metrics in train_steps(trainer(max_steps=5, save_steps=2), tmp_path):
        if metrics.step == 3:
            seen = saved(tmp_path)
            gate.open()
    assert seen == [0]
    assert gate.written == [2, 4, 5]
    assert saved(tmp_path) == [4, 5]
    assert not list(tmp_path.rglob(".*"))


def test_the_last_step_is_saved_when_it_is_yielded(tmp_path: Path) -> None:
    stop = StopRequest()
    for metrics in train_steps(trainer(max_steps=3, save_steps=100), tmp_path):
        assert saved(tmp_path) == ([0, 3] if metrics.step == 3 else [0])
    (tmp_path / "stopped").mkdir()
    for metrics in train_steps(trainer(stop, max_steps=9, save_steps=100), tmp_path / "stopped"):
        if metrics.step == 2:
            stop.wait_for_step()
            stop.receive(15)
    assert (metrics.step, saved(tmp_path / "stopped")) == (3, [0, 3])


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_snapshot

    def full(folder: Path, snapshot: Checkpoint) -> None:
        if step_of(folder) == 2:
            monkeypatch.setattr("d2l.checkpoint.save_file", refuse)
        write(folder, snapshot)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_snapshot", full)


def test_what_the_writer_meets_is_raised_at_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch)
    run = trainer(max_steps=1000, save_steps=2)
    with pytest.raises(CheckpointError, match=r"^cannot write the checkpoint .*step-000002: .*No space left on device"):
        list(train_steps(run, tmp_path))
    assert 3 <= run.step_number <= 4  # at the latest the next save waits
    assert saved(tmp_path) == [0]
    assert not list(tmp_path.rglob(".*"))


def test_an_error_waits_for_the_writer_and_has_what_that_met_as_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch)
    (tmp_path / METRICS).touch()

    def go() -> None:
        with saver(tmp_path, keep=2) as writer:
            writer.save(2, Checkpoint({"w": torch.ones(3)}, {}, {}))
            raise ValueError("first")

    with pytest.raises(ValueError, match="first") as raised:
        go()
    (note,) = raised.value.__notes__
    assert "No space left on device" in note


def test_an_autopsy_names_the_checkpoint_that_was_being_written(tmp_path: Path, gate: Gate) -> None:
    run = trainer(max_steps=9, save_steps=2)
    steps = train_steps(run, tmp_path)
    next(steps)
    next(steps)
    with torch.no_grad():
        run.model.hypernet.get_parameter("head.weight").view(-1)[0] = math.nan
    threading.Timer(0.05, gate.open).start()
    with pytest.raises(NonFiniteError, match=f"to continue there: --resume {step_folder(tmp_path, 2)}"):
        next(steps)


def test_after_an_error_of_its_reader_a_run_writes_no_more(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is given back then, and another process may resume it."""
    monkeypatch.setattr("d2l.train.run.Components", lambda config, on_tokenize, processes: FakeComponents(config))
    config = run_config(max_steps=9, save_steps=2, output_dir=str(tmp_path / "run"))

    def fail(metrics: Mapping[str, float]) -> None:
        if metrics["step"] == 2:
            threading.Timer(0.05, gate.open).start()
            raise RuntimeError("of the tracker")

    with start_new(config, numbered=False) as start:
        with pytest.raises(RuntimeError, match="of the tracker") as raised:
            train(config, start, preflight={"fingerprint": "", "summary": {}}, on_step=fail)
        assert raised.traceback, "it holds all frames, as it does where the command prints it"
        assert gate.written == [2]


class FakeComponents:
    """The tiny model and its rows, as `d2l.build.Components` has them."""

    def __init__(self, config: RunConfig) -> None:
        self.model, self.rows = tiny_model(config, nonzero=False), random_rows()
        self.heldout: tuple[()] = ()
        self.records: tuple[()] = ()


def test_a_slow_writer_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick, pause = tmp_path / "slow", tmp_path / "quick", threading.Event()
    for folder in (slow, quick):
        folder.mkdir()
    changes = {"max_steps": 5, "save_steps": 1}
    list(train_steps(trainer(**changes), quick))
    write = saving.write_snapshot
    monkeypatch.setattr(saving, "write_snapshot", lambda *it: (pause.wait(0.03), write(*it)))
    list(train_steps(trainer(**changes), slow))
    assert saved(slow) == saved(quick) == [4, 5]
    for step in (4, 5):
        assert contents(step_folder(slow, step)) == contents(step_folder(quick, step))
        load_checkpoint(step_folder(slow, step))
