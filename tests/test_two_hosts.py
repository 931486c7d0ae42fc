"""Two hosts with a process each: as one process does; a host that dies, a cable that is cut, other data on one of them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch import launch, train_alone
from support.two_hosts import Host, two_hosts

from d2l.checkpoint import load_checkpoint
from d2l.io.run_folder import METRICS, step_folder

pytestmark = pytest.mark.slow
LIMIT = 150  # seconds, for everything that must not hang
RECORDS = [{"context": f"The value of amber is {n}.", "prompts": ["amber?"], "responses": [f"{n}"]} for n in range(4)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        made = two_hosts()
        with made as pair:
            yield pair
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs network namespaces: {getattr(error, 'stderr', '') or error}")


def start(hosts: tuple[Host, Host], folder: Path, *places: Path, **settings: Any) -> list["subprocess.Popen[str]"]:
    """Start a process on each host, in a working directory of its own."""
    port = str(29500 + os.getpid() % 1000)
    master = ("--master-addr", hosts[0].address, "--master-port", port)
    return [
        launch(
            *(folder, settings, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), *master),
            prefix=host.prefix,
            cwd=places[rank] if places else None,
        )
        for rank, host in enumerate(hosts)
    ]


def finish(started: list["subprocess.Popen[str]"], folder: Path) -> list[dict[str, Any]]:
    """Wait for all, and return what each noted; nothing of one that was killed."""
    said = [it.communicate(timeout=LIMIT)[0] for it in started]
    notes = [folder / f"{rank}.json" for rank in range(2)]
    assert any(it.exists() for it in notes), said
    return [json.loads(it.read_text()) if it.exists() else {} for it in notes]


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until so many steps are taken."""
    until = time.monotonic() + LIMIT
    metrics = folder / "run" / METRICS
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """Weights after the steps of one process."""
    return train_alone(processes=2)[1]


def assert_trained(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    trained = load_checkpoint(step_folder(folder / "run", 6)).hypernet
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_cable_that_is_cut_for_a_while_changes_nothing(
    hosts: tuple[Host, Host], tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    started = start(hosts, tmp_path, pause=0.5)
    wait_for_step(tmp_path, 2)
    hosts[1].plug("down")
    time.sleep(4)
    hosts[1].plug("up")
    assert [note["code"] for note in finish(started, tmp_path)] == [0, 0]
    assert_trained(tmp_path, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_ends_the_other_and_the_run_goes_on(
    hosts: tuple[Host, Host], tmp_path: Path, alone: dict[str, torch.Tensor], victim: int
) -> None:
    started = start(hosts, tmp_path, pause=0.5, config={"save_steps": 1})
    wait_for_step(tmp_path, 2)
    inside = subprocess.run(
        ["ip", "netns", "pids", hosts[victim].namespace], check=True, capture_output=True, text=True
    )
    for process in inside.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    died = time.monotonic()
    note = finish(started, tmp_path)[1 - victim]
    assert time.monotonic() - died < 60
    assert note["code"] == 13
    assert f"rank {1 - victim} of 2 on {hosts[1 - victim].namespace} lost another process" in note["error"]
    assert [it["code"] for it in finish(start(hosts, tmp_path, resume=True), tmp_path)] == [0, 0]
    assert_trained(tmp_path, alone)


def test_a_cable_that_stays_cut_ends_both(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    started = start(hosts, tmp_path, pause=0.5, timeout=20)
    wait_for_step(tmp_path, 2)
    hosts[1].plug("down")
    try:
        notes = finish(started, tmp_path)
    finally:
        hosts[1].plug("up")
    assert [note["code"] for note in notes] == [13, 13]


def test_other_data_on_one_host_is_refused_before_the_first_step(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    places = [tmp_path / host.namespace for host in hosts]
    for number, place in enumerate(places):
        place.mkdir()
        (place / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS[number:])))
    notes = finish(start(hosts, tmp_path, *places, config={"train_ds_names": ["train.jsonl"]}), tmp_path)
    assert [note["code"] for note in notes] == [13, 13]
    assert notes[0]["error"] == notes[1]["error"]
    heading, line = notes[0]["error"].splitlines()
    assert heading.startswith("configuration, data, base or versions of the processes differ")
    assert line.startswith("  data: expected ")
    assert line.endswith(f" in rank 1 of 2 on {hosts[1].namespace}")
    assert not (tmp_path / "run").exists()
