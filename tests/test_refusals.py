"""Who tells a refusal among several processes: one of those that meet the same, and each whose refusal is its own."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from commands import refusals
from commands.refusals import tell_refusal

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent, and its environment for rank 1 of 2."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(refusals, "PATIENCE", 0.5)
    return store


def tell(monkeypatch: pytest.MonkeyPatch, rank: int, refusal: str, *notes: str) -> None:
    """Tell a refusal as a process of this rank, alone on its host or the second one there."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
    tell_refusal(refusal, notes)


def test_the_only_process_tells_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tell(monkeypatch, 0, "lora_r: found 0", "below")
    assert capsys.readouterr() == ("", "Error: lora_r: found 0\nbelow\n")


def test_what_rank_0_tells_is_told_by_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore
) -> None:
    tell(monkeypatch, 0, "no such file", "in rank 0 of 2")
    tell(monkeypatch, 1, "no such file", "in rank 1 of 2")
    assert capsys.readouterr().err == "Error: no such file\nin rank 0 of 2\n"


def test_a_refusal_of_its_own_names_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore
) -> None:
    tell(monkeypatch, 1, "no such file")  # rank 0 goes on
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Error: no such file"
    assert told[1].startswith("in rank 1 of 2 on ")
    tell(monkeypatch, 0, "lost another process")
    capsys.readouterr()
    tell(monkeypatch, 1, "no such file", told[1])
    assert capsys.readouterr().err.splitlines() == told  # named once


def test_what_was_refused_before_a_restart_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore
) -> None:
    tell(monkeypatch, 0, "no such file")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    tell(monkeypatch, 1, "no such file")
    assert "no such file" in capsys.readouterr().err


def test_a_refusal_that_names_its_process_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(refusals, "_shared_store", lambda: pytest.fail("asked"))
    text = f"{refusals.process_name()} lost another process"
    tell(monkeypatch, 1, text)
    assert capsys.readouterr().err == f"Error: {text}\n"


def test_a_process_that_is_stopped_while_it_waits_tells_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore
) -> None:
    monkeypatch.setattr(refusals, "PATIENCE", 60.0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    tell(monkeypatch, 1, "no such file")
    assert capsys.readouterr().err.startswith("Error: no such file\nin rank 1 of 2 on ")


@pytest.mark.parametrize("reason", ["no agent", "agent gone"])
def test_where_nobody_can_be_asked_every_process_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], agent: TCPStore, reason: str
) -> None:
    if reason == "no agent":
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    else:
        monkeypatch.setenv("MASTER_PORT", "1")
    for rank in (0, 1):
        tell(monkeypatch, rank, "no such file")
    assert capsys.readouterr().err.count("Error: no such file") == 2


def test_before_libraries_are_loaded_the_first_process_of_each_host_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(refusals, "_has_loaded", lambda: False)
    monkeypatch.setattr(refusals, "_shared_store", lambda: pytest.fail("asked"))
    for rank in range(4):
        stopping = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        if rank % 2:  # it waits for the launcher to stop it: were it the first to end, the launcher would stop rank 0
            stopping.start()
        tell(monkeypatch, rank, "lora_r: found 0")
        has_waited = not stopping.is_alive()
        stopping.cancel()
        assert has_waited
    told = capsys.readouterr().err
    assert told.count("Error: lora_r: found 0") == 2
    assert "in rank 2 of 4 on " in told


def test_before_libraries_are_loaded_a_process_that_nobody_stops_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(refusals, "_has_loaded", lambda: False)
    monkeypatch.setattr(refusals, "PATIENCE", 0.1)
    tell(monkeypatch, 1, "lora_r: found 0")
    assert capsys.readouterr().err.startswith("Error: lora_r: found 0\nin rank 1 of 2 on ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('$(test "$LOCAL_RANK" = 1 || sleep 1)--set lora_r=0', "lora_r: must be greater than or equal to 1"),
        pytest.param("--data none.jsonl", "none.jsonl: does not exist", marks=pytest.mark.slow),
        pytest.param(
            '$(test "$RANK" = 0 || echo --data none.jsonl)', "none.jsonl: does not exist", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_under_torchrun(tmp_path: Path, options: str, words: str) -> None:
    command = (
        f"exec {sys.executable} -m cli train {ROOT}/configs/tiny_gpt_oss.yaml --max-steps 1 --output out {options}"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "bash", "-c", command], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200
    )
    assert done.stderr.count(words) == 1, done.stderr
    told = done.stderr.split(words)[1].split("\nW")[0]
    assert ("in rank 1 of 2 on " in told) == ("$RANK" in options), done.stderr
