"""A run that is asked to stop: at the end of a step, saved; before there is anything to save, and twice, at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from support.launch import run_here
from support.tiny_model import random_rows, run_config, tiny_model

from commands.stopped import STOPPED, told
from d2l.checkpoint import load_checkpoint
from d2l.io.run_folder import step_folder, step_folders, step_of
from d2l.train import stopping
from d2l.train.loop import Trainer, train_steps
from d2l.train.stopping import SIGNALS, Interrupted, StopRequest, stop_on_signals

ROOT = Path(__file__).resolve().parents[1]


def train(folder: Path, stop: StopRequest, on_step: Callable[[int], None] = lambda step: None) -> Trainer:
    """Four steps, of which every second is saved."""
    config = run_config()
    trainer = Trainer(tiny_model(config), random_rows(), config, stop=stop)
    for metrics in train_steps(trainer, folder):
        on_step(metrics.step)
    return trainer


def saved(folder: Path) -> list[int | None]:
    return [step_of(it) for it in step_folders(folder)]


# Before the first step


@pytest.mark.parametrize("resumed", ["run", "checkpoint", "nothing"])
def test_a_stop_before_a_step_is_taken_says_what_is_left(
    tmp_path: Path, resumed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is resumed from a folder, or from a checkpoint in it, goes on from there."""
    train(tmp_path, StopRequest())
    folder = {"run": tmp_path, "checkpoint": step_folder(tmp_path, 2), "nothing": tmp_path / "new"}[resumed]
    with pytest.raises(typer.Exit) as ended, told(folder, ["ATT101=ours"]):
        raise Interrupted("SIGTERM")
    assert ended.value.exit_code == STOPPED
    left = f"; to go on: d2l train --resume {folder} --ignore ATT101=ours"
    if resumed == "nothing":
        left = ", and nothing was saved: start it again"
    assert capsys.readouterr().err == f"Stopped by SIGTERM before a step was taken{left}\n"


# The loop


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take Ctrl-C as in a terminal, also where the tests run behind `&`, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_a_run_at_the_end_of_its_step_saved(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, said = Trainer.step, list[str]()

    def step(trainer: Trainer) -> object:
        if trainer.step_number == 2:
            os.kill(os.getpid(), number)
        return take(trainer)

    monkeypatch.setattr(Trainer, "step", step)
    stop = StopRequest(announce=said.append)
    with stop_on_signals(stop.receive):
        trainer = train(tmp_path, stop)
    assert (trainer.step_number, saved(tmp_path)) == (3, [2, 3])
    assert said == [f"{number.name}: stopping at the end of this step; a second signal stops at once"]
    assert stop.cause == number.name


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, whole = tmp_path / "stopped", tmp_path / "whole"
    first.mkdir()
    whole.mkdir()
    stop = StopRequest()
    with stop_on_signals(stop.receive):
        train(first, stop, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    assert saved(first) == [2, 3]  # it came when step 2 was saved: the next one is finished
    config = run_config()
    trainer = Trainer(tiny_model(config), random_rows(), config)
    trainer.restore(load_checkpoint(step_folder(first, 3)))
    for _ in train_steps(trainer, first):
        pass
    for name, value in train(whole, StopRequest()).model.hypernet.state_dict().items():
        assert torch.equal(trainer.model.hypernet.state_dict()[name], value), name


def test_a_limit_of_time_stops_a_run_at_the_end_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(perf_counter=lambda: now))

    def spend(step: int) -> None:
        nonlocal now
        now += 20

    stop = StopRequest(minutes=0.5)
    assert not stop.is_made
    assert train(tmp_path, stop, spend).step_number == 3
    assert (saved(tmp_path), stop.cause) == ([2, 3], "--max-minutes 0.5")


def test_before_the_first_step_a_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("it goes on")

    monkeypatch.setattr(Trainer, "step", step)
    stop = StopRequest()
    with pytest.raises(Interrupted, match="SIGUSR1"), stop_on_signals(stop.receive):
        train(tmp_path, stop)
    assert saved(tmp_path) == [0]


# Handlers


def test_handlers_are_given_back_and_ignored_signals_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {it: signal.getsignal(it) for it in SIGNALS}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_on_signals(lambda number: pytest.fail("ignored")):
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])
    assert {it: signal.getsignal(it) for it in SIGNALS} == before


def test_a_thread_changes_no_handler() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), list[object]()

    def look() -> None:
        with stop_on_signals(lambda number: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


TWICE = """
import os, signal, sys
from d2l.train.stopping import StopRequest, stop_on_signals
stop = StopRequest(announce=print)
with stop_on_signals(stop.receive):
    stop.wait_for_step()
    if sys.argv[1:] and os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    if sys.argv[1:]:
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) + 100 + stop.is_made)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there")
"""


def run_twice(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", TWICE, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_second_signal_ends_the_process_by_itself() -> None:
    done = run_twice()
    assert done.returncode == -signal.SIGTERM  # a shell says 128 + 15
    assert "still there" not in done.stdout


def test_a_signal_that_the_launcher_passes_on_is_the_same_request() -> None:
    done = run_twice(TORCHELASTIC_RUN_ID="none")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "still there")


def test_a_later_signal_under_a_launcher_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes one on at once; a second one that comes later is somebody's who does not want to wait."""
    ended: list[int] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(stopping, "_end_by", ended.append)
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    stop.wait_for_step()
    for seconds in (0.0, 0.1, 10.0):
        now[0] = 100 + seconds
        stop.receive(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


def test_a_forked_worker_is_ended_by_a_signal_and_asks_nothing() -> None:
    assert run_twice("fork").returncode == 100 - signal.SIGTERM


# Several processes


@pytest.mark.slow
def test_processes_that_one_signal_reaches_stop_at_one_step(tmp_path: Path) -> None:
    notes = run_here(tmp_path, 2, signal=[1, 2])
    assert [note["code"] for note in notes] == [12, 12]
    assert [note["stopped by"] for note in notes] == ["a request to another process", "SIGTERM"]
    assert saved(tmp_path / "run") == [0, 3]
    assert not any(note["group"] for note in notes), "the group is left"


@pytest.mark.slow
def test_a_process_that_fails_is_named_and_ends_the_others(tmp_path: Path) -> None:
    lost, failed = run_here(tmp_path, 2, crash=[1, 2])
    assert failed["notes"][0].startswith("in rank 1 of 2 on ")
    assert lost["code"] == 13
    assert lost["error"].startswith("rank 0 of 2 on ")
    assert "lost another process of the run" in lost["error"]
    assert not any(note["group"] for note in (lost, failed)), "the group is left"


# The command


@pytest.mark.usefixtures("interruptible")  # a process that is started takes over what is ignored
@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", ["loading", "preflight", "training"])
def test_the_command_ends_with_12_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, phase: str) -> None:
    run = tmp_path / "run"
    values = ["save_steps=1000", "needle_documents=4", "max_steps=500"]
    options = ["--output", str(run), *(word for value in values for word in ("--set", value))]
    with (tmp_path / "said").open("w") as said_file:
        started = subprocess.Popen(
            [sys.executable, "-u", "-m", "cli", "train", "configs/tiny_gpt_oss.yaml", *options],
            cwd=ROOT,
            stdout=said_file,
            stderr=subprocess.STDOUT,
        )
    begun = {
        "loading": lambda: "loading torch" in (tmp_path / "said").read_text(),
        "preflight": lambda: run.exists(),
        "training": lambda: "step 2/" in (tmp_path / "said").read_text(),
    }[phase]
    until = time.monotonic() + 120
    while not begun():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.5)
    started.send_signal(number)
    assert started.wait(timeout=30) == 12
    said = (tmp_path / "said").read_text()
    assert f"topped by {number.name}" in said
    assert "Traceback" not in said
    if phase == "training":
        assert said.rstrip().endswith(f"saved; to go on: d2l train --resume {run}")
        assert saved(run)[-1] == (run / "metrics.jsonl").read_text().count("\n")
    else:
        assert "start it again" in said
        assert not run.exists()
