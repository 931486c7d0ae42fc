"""What a run may be resumed from, and what has to be equal or allowed: small checkpoints, no training."""

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import run_config, tiny_model

from d2l.checkpoint import Checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError
from d2l.fingerprint import Fingerprint
from d2l.io.run_folder import MANIFEST, checkpoints_folder, step_folder
from d2l.train import start as module
from d2l.train.changes import SHAPES, compare_configs
from d2l.train.folder import Change, Identity
from d2l.train.optimizer import learning_rates
from d2l.train.start import Start, start_resumed, with_inputs

OURS = Identity("0" * 32)
PARTS = {"config": "c", "data": "d" * 64, "base_config": "b" * 64, "tokenizer": "t" * 64, "chat": "h" * 64}
INPUTS = Fingerprint(PARTS | {"torch": "2.11"}, {"sliding_window": 16, "vocab_size": 8}, records=12)


def save(
    folder: Path, config: RunConfig | None = None, step: int = 1, run: Identity | None = OURS, **state: Any
) -> Path:
    """Save a checkpoint of a run, as the trainer does."""
    values = {"step": step, "config": (config or run_config()).resolved(), **state}
    values |= {} if run is None else {"run": run.to_json()}
    save_checkpoint(folder, Checkpoint({}, {"rng.torch": torch.zeros(1)}, values))
    return folder


def make_run(folder: Path, *steps: int, **state: Any) -> Path:
    """Make the folder of a run with checkpoints of these steps."""
    for step in steps or (1,):
        save(step_folder(folder, step), step=step, **state)
    (folder / "run.json").write_text(json.dumps(OURS.to_json()))
    return folder


def resume(place: Path, config: RunConfig | None = None, now: Fingerprint | None = None, **reasons: str) -> Start:
    """What `d2l train --resume` finds before it trains."""
    with start_resumed(config or run_config(), place, reasons) as start:
        return with_inputs(start, now)


# Whose checkpoint it is


def test_a_run_and_a_checkpoint_in_it_are_resumed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 3)
    (tmp_path / "latest").symlink_to(step_folder(run, 2))
    (tmp_path / "alias").symlink_to(run)
    for place, folder, step in (
        (run, run, 3),
        (step_folder(run, 2), run, 2),
        (tmp_path / "latest", run, 2),
        (tmp_path / "alias", tmp_path / "alias", 3),
    ):
        start = resume(place)
        assert (start.folder, start.step, start.identity) == (folder, step, OURS)


def test_a_copied_checkpoint_is_not_taken_for_one_of_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5)
    other = make_run(tmp_path / "other", 7, run=Identity("1" * 32))
    before = sorted(path for path in tmp_path.rglob("*"))
    copy = run / "a" / "step-000005"
    shutil.copytree(step_folder(run, 5), copy)
    renamed = checkpoints_folder(run) / "step-best"
    shutil.copytree(step_folder(run, 5), renamed)
    for place in (copy, renamed):
        with pytest.raises(
            CheckpointError, match=r"lies outside of its run: expected RUN/checkpoints.*cp -r it to NEW"
        ):
            resume(place)
    shutil.rmtree(copy.parent)
    shutil.rmtree(renamed)
    for place in (other, step_folder(other, 7)):
        with pytest.raises(CheckpointError, match=r"belongs to run 11111111, and .* is the folder of run 00000000"):
            resume(place)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_copy_in_a_folder_of_its_own_goes_on_as_its_run(tmp_path: Path) -> None:
    new = tmp_path / "new"
    save(step_folder(new, 5), step=5)
    assert resume(new).identity == OURS
    linked = tmp_path / "linked"
    linked.mkdir()
    checkpoints_folder(linked).symlink_to(checkpoints_folder(make_run(tmp_path / "run")))
    with pytest.raises(CheckpointError, match="is the folder of no run"):
        resume(linked)


def test_folders_without_a_run_are_refused_and_left_alone(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="found no checkpoint in it"):
            resume(place)
    assert not list(tmp_path.iterdir())
    imported = Checkpoint({}, {}, {"config": run_config().resolved()})
    save_checkpoint(tmp_path / "imported", imported)
    save_checkpoint(step_folder(tmp_path, 1), imported)
    for place in (tmp_path, tmp_path / "imported"):
        with pytest.raises(CheckpointError, match="no run to continue: it was imported"):
            resume(place)
    (step_folder(tmp_path, 1) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        resume(step_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"no checkpoint to go on from; .*manifest.json is missing"):
        resume(tmp_path)


def test_a_damaged_identity_is_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for text in ("{", "[]", '{"id": "x"}', '{"id": "x", "changes": [{"step": 1}]}', "[" * 100_000):
        (run / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run.json cannot be read: .*remove the file"):
            resume(run)
    (run / "run.json").unlink()
    assert resume(run).identity == OURS


def test_a_damaged_checkpoint_that_is_passed_over_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 10)
    (step_folder(run, 10) / "state.json").write_text("{}")
    (step_folder(run, 2) / MANIFEST).write_text("[" * 100_000)
    start = resume(run)
    assert start.step == 1
    assert [note.partition(": ")[0] for note in start.notes] == ["passed over a newer checkpoint"] * 2
    assert "step-000010/state.json: expected " in start.notes[0]
    assert "step-000002/manifest.json cannot be read: " in start.notes[1]


def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for place in (run, step_folder(run, 1)):
        with (
            start_resumed(run_config(), place),
            pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on "),
            start_resumed(run_config(), place),
        ):
            pytest.fail("two writers")
    assert resume(run).step == 1


# What has to be equal


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, ["learning_rate: 0.01 in the checkpoint, 0.5 now"]),
        (
            {"seed": 9, "warmup_steps": 3},
            ["warmup_steps: 0 in the checkpoint, 3 now", "seed: 0 in the checkpoint, 9 now"],
        ),
    ],
)
def test_another_configuration_is_refused_key_by_key(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        resume(run, run_config(**changes))
    first, *rest, last = str(raised.value).splitlines()
    assert first == f"{step_folder(run, 1)} was made with another configuration:"
    assert [line.strip() for line in rest] == named
    assert last.startswith("to go on all the same: ")
    assert sorted(last.split()[7::2]) == sorted(f"{key}=REASON" for key in changes)


# Each makes a hypernetwork of other weights.
OTHER_SHAPES: dict[str, Any] = {
    **{"lora_r": 3, "target_modules": ("q_proj",), "ctx_encoder_type": "concat_layers", "latent_size": 24},
    **{"n_latent_queries": 5, "num_blocks": 2, "num_self_attn_per_block": 2, "perceiver_heads": 8},
    **{"perceiver_head_dim": 16, "per_rank_gen": False, "per_layer_processing": False, "num_pre_head_layers": 3},
    **{"use_bias": False},
}


def test_what_changes_the_weights_cannot_be_allowed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert OTHER_SHAPES.keys() == SHAPES
    own = {name: value.shape for name, value in tiny_model(run_config()).hypernet.state_dict().items()}
    for key, value in OTHER_SHAPES.items():
        other = run_config(**{key: value})
        assert own != {name: it.shape for name, it in tiny_model(other).hypernet.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"{key}: .*\n(.*\n)*the checkpoint's weights have other shapes"):
            resume(run, other, **{key: "I want it"})


def test_saves_and_paths_may_change(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    start = resume(run, run_config(save_steps=7, save_total_limit=9, output_dir="elsewhere"))
    assert (start.folder, start.step, start.identity.changes) == (run, 1, ())


def test_a_configuration_with_every_kind_of_value_is_equal_to_itself_when_read_back(tmp_path: Path) -> None:
    config = run_config(num_chunk_probs={1: 0.3, 2: 0.7}, max_ctx_chunk_len=50, min_lr=1e-7, adam_epsilon=1e-8)
    save(step_folder(tmp_path, 1), config)
    assert resume(tmp_path, config).identity.changes == ()


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    save_checkpoint(
        step_folder(tmp_path, 1), Checkpoint({}, {"rng.torch": torch.zeros(1)}, {"step": 1, "config": {"lora_x": 1}})
    )
    with pytest.raises(CheckpointError, match=r"its configuration is of another version:\n  lora_x"):
        resume(tmp_path)


def test_allowed_changes_are_recorded_once_and_known_afterwards(tmp_path: Path) -> None:
    run, other = make_run(tmp_path), run_config(learning_rate=0.5, seed=9)
    start = resume(run, other, learning_rate="it is too slow", seed="no matter")
    expected = [
        Change(1, "learning_rate", 0.01, 0.5, "it is too slow"),
        Change(1, "seed", 0, 9, "no matter"),
    ]
    assert list(start.identity.changes) == expected
    (run / "run.json").write_text(json.dumps(start.identity.to_json()))  # as `d2l.train.folder.prepare` does
    assert resume(run, other).identity == start.identity
    with pytest.raises(CheckpointError, match="seed: 0 in the checkpoint, 8 now"):
        resume(run, run_config(learning_rate=0.5, seed=8))


@pytest.mark.parametrize(("field", "words"), [("lr", "did you mean learning_rate"), ("remarks", "expected a config")])
def test_unknown_fields_are_refused(tmp_path: Path, field: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"--allow-change {field}: .*{words}"):
        resume(make_run(tmp_path), **{field: "why not"})


def test_a_run_that_has_all_its_steps_is_not_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4)
    start = resume(run, run_config(max_steps=4, seed=9))
    assert (start.step, start.identity) == (4, OURS)


# Data and base


@pytest.mark.parametrize(
    ("other", "field", "words"),
    [
        (replace(INPUTS, parts=INPUTS.parts | {"data": "e" * 64}, records=13), "data", "dddddddddddd in the checkpoint, "
         r"eeeeeeeeeeee now \(sha256\); 12 records then, 13 now"),
        (replace(INPUTS, parts=INPUTS.parts | {"base_config": "e" * 64}, base_config={"sliding_window": 32}), "base_config",
         "sliding_window 16 in the checkpoint, 32 now; vocab_size 8 in the checkpoint, None now"),
        (replace(INPUTS, parts=INPUTS.parts | {"tokenizer": "e" * 64}), "tokenizer", "tttttttttttt in"),
        (replace(INPUTS, parts=INPUTS.parts | {"chat": "e" * 64}), "chat", "hhhhhhhhhhhh in"),
    ],
)  # fmt: skip
def test_other_data_and_another_base_are_refused_or_allowed(
    tmp_path: Path, other: Fingerprint, field: str, words: str
) -> None:
    run = make_run(tmp_path, inputs=INPUTS.to_json())
    assert resume(run, now=INPUTS).identity == OURS
    with pytest.raises(CheckpointError, match=rf"was made with other data or another base:\n  {field}: {words}"):
        resume(run, now=other)
    start = resume(run, now=other, **{field: "it was mended"})
    change = Change(1, field, INPUTS.parts[field], other.parts[field], "it was mended")
    assert start.identity.changes == (change,)
    assert start.evidence() == {"run": start.identity.to_json(), "inputs": other.to_json()}
    assert start.notes == ()


def test_what_cannot_be_compared_and_what_did_not_change_is_noted(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old")
    (note,) = resume(old, now=INPUTS).notes
    assert "holds no fingerprints of its data and base" in note
    run = make_run(tmp_path / "run", inputs=INPUTS.to_json())
    newer = replace(INPUTS, parts=INPUTS.parts | {"torch": "2.12", "config": "other"})
    assert resume(run, now=newer, data="it was mended").notes == (
        "torch is 2.12, and was 2.11 when the checkpoint was made",
        "--allow-change data: it is as it was",
    )


# Another number of processes


@pytest.mark.parametrize(
    ("accumulated", "before", "now", "processes", "words"),
    [
        (4, 2, 8, 1, None),
        (4, 2, 4, 2, None),
        (4, 2, 2, 4, None),
        (4, 2, 4, 1, "4 on 2 processes = 8 micro-batches a step in the checkpoint, 4 on 1 process = 4 now"),
        (4, 2, 2, 2, "2 on 2 processes = 4 now"),
        (4, 2, 4, 3, "4 on 3 processes = 12 now"),
    ],
)
def test_the_micro_batches_of_a_step_stay_as_many(
    accumulated: int, before: int, now: int, processes: int, words: str | None
) -> None:
    then, ours = (run_config(gradient_accumulation_steps=number) for number in (accumulated, now))
    found = list(compare_configs(then, ours, {"step": 1, "processes": before}, processes))
    assert [it.field for it in found] == ["gradient_accumulation_steps"] * bool(words)
    for it in found:
        assert words is not None
        assert words in it.text
        total = accumulated * before
        if total % processes == 0:
            assert it.advice.endswith(f"--set gradient_accumulation_steps={total // processes}")
        else:
            assert it.advice.endswith("cannot share 8 micro-batches; for the same, resume on 1 or 2 or 4 or 8")


def test_the_number_of_processes_reaches_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, processes=2)
    with pytest.raises(CheckpointError, match=r"2 on 2 processes = 4 .*\n.*--set gradient_accumulation_steps=4"):
        resume(run)
    assert resume(run, run_config(gradient_accumulation_steps=4)).identity == OURS


# More steps

SCHEDULES = ("cosine_with_min_lr", "constant_with_warmup", "linear", "warmup_stable_decay")


@given(
    kind=st.sampled_from(SCHEDULES),
    planned=st.integers(1, 12),
    wanted=st.integers(1, 20),
    warmup=st.integers(0, 6),
    decay=st.integers(0, 6),
    data=st.data(),
)
def test_steps_go_on_freely_only_where_the_run_had_the_rates_of_the_longer_one(
    kind: str, planned: int, wanted: int, warmup: int, decay: int, data: st.DataObject
) -> None:
    then = run_config(lr_scheduler_type=kind, max_steps=planned, warmup_steps=warmup, decay_steps=decay)
    now = then.model_copy(update={"max_steps": wanted})
    taken = data.draw(st.integers(0, planned))
    found = list(compare_configs(then, now, {"step": taken, "processes": 1}, 1))
    resumed = learning_rates(then, range(taken)) + learning_rates(now, range(taken, wanted))
    as_one = resumed[:wanted] == learning_rates(now, range(wanted))
    assert as_one or found
    assert not found or learning_rates(then, range(taken)) != learning_rates(now, range(taken))
    if kind == "constant_with_warmup" or wanted == planned or taken <= min(warmup, planned - decay):
        assert not found


@pytest.mark.parametrize(
    ("kind", "taken", "is_free"),
    [
        ("cosine_with_min_lr", 1, True),  # its warm-up and peak are those of every length
        ("cosine_with_min_lr", 2, False),
        ("linear", 10, False),
        ("constant_with_warmup", 10, True),
        ("warmup_stable_decay", 7, True),
        ("warmup_stable_decay", 10, False),
    ],
)
def test_lengths_by_schedule(kind: str, taken: int, is_free: bool) -> None:
    then = run_config(lr_scheduler_type=kind, max_steps=10, decay_steps=3)
    found = list(compare_configs(then, then.model_copy(update={"max_steps": 15}), {"step": taken}, 1))
    assert found == [] if is_free else [it.field for it in found] == ["max_steps"]


def test_the_jump_is_named(tmp_path: Path) -> None:
    config = run_config(max_steps=10)
    save(step_folder(tmp_path, 10), config, step=10)
    longer = config.model_copy(update={"max_steps": 15})
    with pytest.raises(CheckpointError) as raised:
        resume(tmp_path, longer)
    (last,), (following,) = learning_rates(config, [9]), learning_rates(longer, [10])
    assert following > 8 * last
    assert f"from {last:.3g} in step 10 to {following:.3g} in step 11" in str(raised.value)
    assert "leave it at 10, or start anew with 15" in str(raised.value)
    (change,) = resume(tmp_path, longer, max_steps="more").identity.changes
    assert change == Change(10, "max_steps", 10, 15, "more")


def test_locks_are_given_back_where_a_resume_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CheckpointError):
        resume(run, run_config(seed=9))
    with ExitStack() as held:
        module._lock(run, held)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "run.json"]
