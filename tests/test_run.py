"""A run from a configuration: its folder, what it leaves there, and continuing it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import base_config, run_config

from d2l.checkpoint import MANIFEST, Checkpoint, load_checkpoint, save_checkpoint, step_folder
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError
from d2l.train.events import read_events
from d2l.train.metrics import MEASURED, METRICS
from d2l.train.run import checkpoint_to_resume, new_folder, train

PREFLIGHT = {"fingerprint": "abc", "summary": {"pass": 3, "note": "ü"}, "findings": []}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Four steps over needles, on a base of two layers that lies in a file."""
    shallow = base_config(vocab_size=1024, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    (tmp_path / "base.json").write_text(shallow.to_json_string(use_diff=False))
    return run_config(
        model_name_or_path=str(tmp_path / "base.json"),
        tokenizer_name_or_path="configs/models/tiny_gpt_oss",
        train_ds_names=("needle",),
        needle_documents=3,
        needle_pairs=1,
        needle_filler_words=0,
        max_packed_inp_len=80,
        max_packed_ctx_len=80,
        gradient_accumulation_steps=1,
        save_steps=1,
        max_steps=3,
        output_dir=str(tmp_path / "run"),
    )


def go(config: RunConfig, place: Path | None = None) -> list[Mapping[str, float]]:
    """What `d2l train` does after the preflight: a new run, or the one at `place` continued."""
    records: list[Mapping[str, float]] = []
    if place is None:
        folder, checkpoint = new_folder(config, numbered=False), None
    else:
        folder, checkpoint = checkpoint_to_resume(config, place)
    train(config, folder, preflight=PREFLIGHT, checkpoint=checkpoint, on_step=records.append)
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
def test_a_folder_that_is_absent_or_empty_is_taken_as_it_is(tmp_path: Path, numbered: bool) -> None:
    for wanted in (tmp_path / "absent" / "run", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert new_folder(run_config(output_dir=str(wanted)), numbered=numbered) == wanted
        assert not (tmp_path / "absent").exists(), "nothing is made yet"


def test_a_folder_in_use_is_numbered(tmp_path: Path) -> None:
    config = run_config(output_dir=str(tmp_path / "run"))
    for name in ("run", "run-2", "run-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert new_folder(config, numbered=True) == tmp_path / "run-3"


@pytest.mark.parametrize("make", [lambda path: (path.mkdir(), (path / "x").touch()), lambda path: path.touch()])
def test_a_folder_in_use_is_refused_where_it_is_named(tmp_path: Path, make: Any) -> None:
    wanted = tmp_path / "run"
    make(wanted)
    with pytest.raises(CheckpointError, match=rf"{wanted} is not empty.*--output.*--resume {wanted}"):
        new_folder(run_config(output_dir=str(wanted)), numbered=False)


# A run


def test_trackers_get_every_step_from_where_the_run_continues_and_a_resume_is_noted(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    @contextmanager
    def trackers(config: RunConfig, folder: Path, step: int) -> Iterator[Any]:
        told.append((config, folder, step))
        yield told.append
        told.append("finished")

    monkeypatch.setattr("d2l.train.run.started_trackers", trackers)
    folder = Path(config.output_dir)
    records = go(config)
    assert told == [(config, folder, 0), *records, "finished"]
    assert read_events(folder) == []
    told.clear()
    longer = config.model_copy(update={"max_steps": 4, "report_to": ("wandb",), "logging_steps": 2})
    records = go(longer, folder)
    assert told == [(longer, folder, 3), *records, "finished"]
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
    assert RunConfig(**state["config"]) == config
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "preflight.json",
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
    assert load_config(finished / "config.yaml") == config, "the config that it was started with"


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, ["learning_rate: 0.01 in the checkpoint, 0.5 now"]),
        ({"seed": 9, "lora_r": 3}, ["lora_r: 2 in the checkpoint, 3 now", "seed: 0 in the checkpoint, 9 now"]),
    ],
)
def test_another_configuration_is_refused_key_by_key(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    folder = step_folder(tmp_path, 1)
    save_checkpoint(folder, checkpoint_of(run_config()))
    with pytest.raises(CheckpointError) as raised:
        checkpoint_to_resume(run_config(**changes), tmp_path)
    first, *rest = str(raised.value).splitlines()
    assert first == f"{folder} was made with another configuration:"
    assert [line.strip() for line in rest] == named


def test_steps_saves_and_paths_may_change(tmp_path: Path) -> None:
    save_checkpoint(step_folder(tmp_path, 1), checkpoint_of(run_config()))
    changed = run_config(max_steps=99, save_steps=7, save_total_limit=9, output_dir="elsewhere")
    folder, checkpoint = checkpoint_to_resume(changed, tmp_path)
    assert (folder, checkpoint.state["step"]) == (tmp_path, 1)


def test_a_configuration_with_every_kind_of_value_is_equal_to_itself_when_read_back(tmp_path: Path) -> None:
    config = run_config(num_chunk_probs={1: 0.3, 2: 0.7}, max_ctx_chunk_len=50, min_lr=1e-7, adam_epsilon=1e-8)
    save_checkpoint(step_folder(tmp_path, 1), checkpoint_of(config))
    assert checkpoint_to_resume(config, tmp_path)[0] == tmp_path


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no checkpoint in it"):
        checkpoint_to_resume(run_config(), tmp_path)
    save_checkpoint(step_folder(tmp_path, 1), Checkpoint({}, {}, {"config": run_config().resolved()}))
    with pytest.raises(CheckpointError, match="no run to continue: it was imported"):
        checkpoint_to_resume(run_config(), tmp_path)
    (step_folder(tmp_path, 1) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint_to_resume(run_config(), step_folder(tmp_path, 1))


def checkpoint_of(config: RunConfig) -> Checkpoint:
    return Checkpoint({}, {"rng.torch": torch.zeros(1)}, {"step": 1, "config": config.resolved()})
