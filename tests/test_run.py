"""A run from a configuration: its folder, what it leaves there, and continuing it."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.tiny_model import run_config
from support.tiny_run import needle_config

from d2l.checkpoint import load_checkpoint, save_checkpoint
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError
from d2l.io.atomic import make_folders
from d2l.io.run_folder import METRICS, step_folder
from d2l.train.events import FAILED, read_events
from d2l.train.history import read_history
from d2l.train.metrics import MEASURED
from d2l.train.optimizer import learning_rates
from d2l.train.run import train
from d2l.train.start import start_new, start_resumed

PREFLIGHT = {"fingerprint": "abc", "summary": {"pass": 3, "note": "ü"}, "findings": []}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Three steps of one packed row."""
    return needle_config(tmp_path, gradient_accumulation_steps=1)


def go(config: RunConfig, place: Path | None = None, **reasons: str) -> list[Mapping[str, float]]:
    """What `d2l train` does after the preflight: a new run, or the one at `place` continued."""
    records: list[Mapping[str, float]] = []
    with start_new(config, numbered=False) if place is None else start_resumed(config, place, reasons) as start:
        train(config, start, preflight=PREFLIGHT, on_step=records.append)
    return records


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def without_time(records: list[Any]) -> list[dict[str, float]]:
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    one, other = load_checkpoint(ours), load_checkpoint(theirs)
    assert one.hypernet.keys() == other.hypernet.keys()
    for name, value in one.hypernet.items():
        torch.testing.assert_close(value, other.hypernet[name], rtol=0, atol=0, msg=name)


# The folder


@pytest.mark.parametrize("numbered", [False, True])
def test_a_folder_that_is_absent_or_empty_is_taken_and_removed_where_it_stays_empty(
    tmp_path: Path, numbered: bool
) -> None:
    (tmp_path / "empty").mkdir()
    for wanted in (tmp_path / "absent" / "run", tmp_path / "empty"):
        with start_new(run_config(output_dir=str(wanted)), numbered=numbered) as start:
            assert start.folder == wanted
            assert wanted.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_folder_in_use_is_numbered(tmp_path: Path) -> None:
    config = run_config(output_dir=str(tmp_path / "run"))
    for name in ("run", "run-2", "run-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with start_new(config, numbered=True) as first, start_new(config, numbered=True) as second:
        assert [first.folder.name, second.folder.name] == ["run-3", "run-5"], "both start at the same time"


def test_a_folder_in_use_is_refused_where_it_is_named(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    config = run_config(output_dir=str(wanted))
    with (
        start_new(config, numbered=False),
        pytest.raises(CheckpointError, match=rf"{wanted} is in use by process \d+ on "),
        start_new(config, numbered=False),
    ):
        pytest.fail("two runs in one folder")
    wanted.mkdir()
    (wanted / "x").touch()
    expected = rf"{wanted} is not empty.*--output.*--resume {wanted}"
    with pytest.raises(CheckpointError, match=expected), start_new(config, numbered=False):
        pytest.fail("it is not free")


def test_a_folder_that_another_process_has_just_used_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_late(folder: Path) -> list[Path]:
        made = make_folders(folder)
        if folder.name == "run":
            (folder / "config.yaml").touch()  # of a run that has ended since the folder was found free
        return made

    monkeypatch.setattr("d2l.train.folder.make_folders", make_late)
    with start_new(run_config(output_dir=str(tmp_path / "run")), numbered=True) as start:
        assert start.folder.name == "run-2"


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    for place, words in {
        "README.md": "README.md is a file, and nothing is written over; choose another --output",
        "README.md/x/y": "README.md/x/y.*: Not a directory; choose another --output",
        300 * "x": "File name too long; choose another --output",
    }.items():
        config = run_config(output_dir=str(tmp_path / place))
        with pytest.raises(CheckpointError, match=words), start_new(config, numbered=False):
            pytest.fail("it cannot be made")


# A run


def test_trackers_get_every_step_from_where_the_run_continues_and_a_resume_is_noted(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    @contextmanager
    def trackers(config: RunConfig, folder: Path, identity: str, step: int) -> Iterator[Any]:
        told.append((config, folder, identity, step))
        yield told.append
        told.append("finished")

    monkeypatch.setattr("d2l.train.run.started_trackers", trackers)
    folder = Path(config.output_dir)
    records = go(config)
    run = json.loads((folder / "run.json").read_text())["id"]
    assert told == [(config, folder, run, 0), *records, "finished"]
    assert read_events(folder) == []
    told.clear()
    longer = config.model_copy(update={"max_steps": 4, "report_to": ("wandb",), "logging_steps": 2})
    records = go(longer, folder)
    assert told == [(longer, folder, run, 3), *records, "finished"]
    assert [event.text for event in read_events(folder)] == ["resumed after step 3"]


def test_a_run_writes_config_preflight_metrics_and_checkpoints(config: RunConfig) -> None:
    folder = Path(config.output_dir)
    records = go(config)
    assert load_config(folder / "config.yaml") == config
    assert json.loads((folder / "preflight.json").read_text(encoding="utf-8")) == PREFLIGHT
    assert lines(folder) == records
    assert [record["step"] for record in records] == [1, 2, 3]
    state = load_checkpoint(step_folder(folder, 3)).state
    assert state["fingerprint"] == PREFLIGHT["fingerprint"]
    assert state["preflight"] == PREFLIGHT["summary"]
    assert state["processes"] == 1
    assert RunConfig(**state["config"]) == config
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "preflight.json",
        "run.json",
    ]


def test_the_same_config_gives_the_same_run(config: RunConfig, tmp_path: Path) -> None:
    other = config.model_copy(update={"output_dir": str(tmp_path / "other")})
    assert without_time(go(config)) == without_time(go(other))
    assert_same_checkpoint(step_folder(Path(config.output_dir), 3), step_folder(Path(other.output_dir), 3))


# Continuing


@pytest.fixture
def finished(config: RunConfig) -> Path:
    """A run of three steps with checkpoints of the last two, 2 and 3."""
    go(config)
    return Path(config.output_dir)


def test_a_finished_run_is_continued_to_more_steps(config: RunConfig, finished: Path) -> None:
    longer = config.model_copy(update={"max_steps": 5})
    records = go(longer, finished)
    assert [record["step"] for record in records] == [4, 5]
    assert [line["step"] for line in lines(finished)] == [1, 2, 3, 4, 5]
    assert load_config(finished / "config.yaml") == longer, "the config of the newest start"


def test_a_damaged_newest_checkpoint_is_renamed_and_the_run_continues_from_the_one_before(
    config: RunConfig, finished: Path, tmp_path: Path
) -> None:
    expected = lines(finished)
    untouched = tmp_path / "untouched"
    step_folder(finished, 3).rename(untouched)
    save_checkpoint(step_folder(finished, 3), load_checkpoint(untouched))
    (step_folder(finished, 3) / "hypernet.safetensors").write_bytes(b"damaged")

    assert [record["step"] for record in go(config, finished)] == [3]
    assert without_time(lines(finished)) == without_time(expected)
    assert_same_checkpoint(step_folder(finished, 3), untouched)
    assert (finished / "checkpoints" / "superseded-step-000003" / "hypernet.safetensors").read_bytes() == b"damaged"


def test_a_run_continues_from_an_older_checkpoint_that_is_named(config: RunConfig, finished: Path) -> None:
    expected = lines(finished)
    for superseded in ("superseded-step-000003", "superseded-step-000003-2"):
        go(config, step_folder(finished, 2))
        assert without_time(lines(finished)) == without_time(expected)
        assert_same_checkpoint(step_folder(finished, 3), finished / "checkpoints" / superseded)


def test_metrics_of_steps_after_the_checkpoint_are_not_kept_twice(config: RunConfig, finished: Path) -> None:
    expected = lines(finished)
    for file in step_folder(finished, 3).iterdir():
        file.unlink()
    step_folder(finished, 3).rmdir()  # the run was killed before it could save step 3
    go(config, finished)
    assert without_time(lines(finished)) == without_time(expected)


def test_a_longer_run_takes_the_schedule_that_it_would_have_had_where_that_is_allowed(
    config: RunConfig, tmp_path: Path
) -> None:
    config = config.model_copy(update={"lr_scheduler_type": "cosine_with_min_lr"})
    folder, longer = Path(config.output_dir), config.model_copy(update={"max_steps": 5})
    go(config)
    with pytest.raises(
        CheckpointError, match=r"max_steps: 3 in the checkpoint, 5 now, .*cosine_with_min_lr.*\n.*leave it"
    ):
        go(longer, folder)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    go(longer, folder, max_steps="more to learn")
    rates = [line["lr"] for line in lines(folder)]
    assert rates == learning_rates(config, range(3)) + learning_rates(longer, [3, 4])
    assert go(longer, folder) == [], "it is allowed for good"
    state = load_checkpoint(step_folder(folder, 5)).state
    change = {"step": 3, "field": "max_steps", "was": 3, "now": 5, "reason": "more to learn"}
    assert state["run"]["changes"] == [change]
    assert json.loads((folder / "run.json").read_text()) == state["run"]


def test_the_learning_rate_is_changed_on_purpose(config: RunConfig, finished: Path) -> None:
    slower = config.model_copy(update={"learning_rate": 0.001, "max_steps": 5})
    go(slower, finished, learning_rate="it jumps about")
    assert [line["lr"] for line in lines(finished)] == [0.01] * 3 + [0.001] * 2
    go(slower, step_folder(finished, 4))
    assert [line["lr"] for line in lines(finished)] == [0.01] * 3 + [0.001] * 2, "allowed from step 3 on"


# Interruptions


def stop_now(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["d2l.train.loop.save_checkpoint", "d2l.train.loop.Trainer.step"])
def test_a_run_that_stops_before_its_first_step_is_resumed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = go(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        patch.setattr(place, stop_now)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    folder = Path(config.output_dir)
    assert without_time(go(config, folder)) == without_time(expected)
    assert_same_checkpoint(step_folder(folder, 3), step_folder(tmp_path / "whole", 3))


def test_a_folder_that_was_only_made_is_taken_by_the_next_run(config: RunConfig, tmp_path: Path) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / ".lock").touch()  # of a process that was killed
    with pytest.raises(CheckpointError, match="found no checkpoint in it"):
        go(config, folder)
    assert len(go(config)) == 3


def test_metrics_are_whole_when_a_resume_is_killed(
    config: RunConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (finished / METRICS).read_bytes()

    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:9].encode())
        stop_now()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(KeyboardInterrupt):
            go(config, step_folder(finished, 2))
    assert (finished / METRICS).read_bytes() == expected


@pytest.mark.parametrize("torn", ['{"step": 3, "ce', '{"step": 2, "ce_loss": 1.0}'])
def test_a_torn_line_of_metrics_is_dropped(config: RunConfig, finished: Path, torn: str) -> None:
    """Also one that lacks its end alone: the next one would be written behind it."""
    expected = lines(finished)
    with (finished / METRICS).open("a") as file:
        file.write(torn)
    go(config, step_folder(finished, 2))
    assert without_time(lines(finished)) == without_time(expected)


def test_leftovers_of_killed_writers_are_removed(config: RunConfig, finished: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f"partial-{socket.gethostname()}-{dead.pid}-0a1b2c3d"
    theirs = finished / f".scores.json.partial-elsewhere-{os.getpid()}-0a1b2c3d"
    for folder in (
        theirs,
        finished / f".metrics.jsonl.{name}",
        finished / "checkpoints" / f".step-000004.{name}",
        finished / "checkpoints" / ".step-000004.partial-elsewhere-1-0a1b2c3d",  # nobody but this process writes here
        finished / "checkpoints" / ".step-000004.partial-1234",  # of d2l 0.1.0
    ):
        folder.mkdir()
        (folder / "hypernet.safetensors").touch()
    go(config, step_folder(finished, 2))
    assert list(finished.rglob(".*")) == [theirs]


# The disk


def test_a_full_disk_is_one_message_and_the_run_goes_on_from_its_newest_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = go(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    folder = Path(config.output_dir)

    def save(tensors: Any, path: Path) -> None:
        if "step-000002" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr("d2l.checkpoint.save_file", save)
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-000002: .*No space left"):
            go(config)
    failed = read_events(folder)[-1].text
    assert re.match(
        f"{FAILED} [23]: CheckpointError: cannot write the checkpoint", failed
    )  # it is written in the background
    assert read_history(folder).state(time.time()) == "died"
    go(config, folder)
    assert without_time(lines(folder)) == without_time(expected)


def test_a_full_disk_is_named_for_metrics_too(
    config: RunConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2l.train.loop.METRICS", "/dev/full")
    longer = config.model_copy(update={"max_steps": 4})
    with pytest.raises(CheckpointError, match=rf"cannot write to {finished}.*No space left on device; make room there"):
        go(longer, finished)


# Links


def test_nothing_is_pruned_or_renamed_through_a_link(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    for step in (2, 3):
        step_folder(finished, step).rename(tmp_path / f"elsewhere-{step}")
        step_folder(finished, step).symlink_to(tmp_path / f"elsewhere-{step}")
    go(config.model_copy(update={"max_steps": 7}), step_folder(finished, 2))
    for step in (2, 3):
        load_checkpoint(tmp_path / f"elsewhere-{step}")
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000006", "step-000007", "superseded-step-000003"]
