"""Checkpoint folders: saving, verification, damage, pruning."""

import json
from pathlib import Path

import pytest
import torch

from d2l import checkpoint as module
from d2l.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from d2l.errors import CheckpointError
from d2l.io.run_folder import MANIFEST, step_folder


def example(**hypernet: object) -> Checkpoint:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "transposed": shared.T, "row": shared[0], **hypernet}
    return Checkpoint(hypernet=tensors, trainer={"step": torch.tensor(3)}, state={"step": 3, "config": {"lora_r": 8}})  # type: ignore[arg-type]


def test_saved_is_loaded_shared_and_strided_tensors_included(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-000003", example())
    loaded = load_checkpoint(tmp_path / "step-000003")
    for name, value in example().hypernet.items():
        torch.testing.assert_close(loaded.hypernet[name], value, rtol=0, atol=0)
    assert loaded.state == example().state
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("text", "a str, expected a tensor"), ({"r": 8}, "a dict"), (torch.tensor([1.0, float("nan")]), "not finite")],
)
def test_values_that_are_not_finite_tensors_are_refused_and_nothing_left(
    tmp_path: Path, value: object, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        save_checkpoint(tmp_path / "step-000003", example(bad=value))
    assert not list(tmp_path.iterdir())


def test_state_that_is_not_json_is_refused_and_nothing_left(tmp_path: Path) -> None:
    for state in ({"path": Path()}, {"loss": float("inf")}):
        with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
            save_checkpoint(tmp_path / "step-000003", Checkpoint({}, {}, state))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-000003", example())
    with pytest.raises(CheckpointError, match="never written over"):
        save_checkpoint(tmp_path / "step-000003", example())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "step-000003", example())
    assert not list(tmp_path.iterdir())


def damage_size(folder: Path) -> None:
    with (folder / "trainer.safetensors").open("ab") as file:
        file.write(b"x")


def damage_content(folder: Path) -> None:
    data = bytearray((folder / "hypernet.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "hypernet.safetensors").write_bytes(data)


def damage_list(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["state.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_size, "bytes, found"),
        (damage_content, "sha256"),
        (damage_list, "does not list state.json"),
        (lambda folder: (folder / "state.json").unlink(), "is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "is no checkpoint"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_one_before_it_taken(tmp_path: Path, damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    for step in (1, 2):
        save_checkpoint(step_folder(tmp_path, step), example())
    damage(step_folder(tmp_path, 2))
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(step_folder(tmp_path, 2))
    newest, refused = find_newest_checkpoint(tmp_path)
    assert newest == step_folder(tmp_path, 1)
    assert len(refused) == 1
    found = find_checkpoint(tmp_path)
    assert (found.folder, list(found.passed_over)) == (newest, refused)


def test_pruning_keeps_the_newest_and_what_it_did_not_finish(tmp_path: Path) -> None:
    for step in range(4):
        save_checkpoint(step_folder(tmp_path, step), example())
    (step_folder(tmp_path, 3) / MANIFEST).unlink()
    prune_checkpoints(tmp_path, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002", "step-000003"]


def test_steps_are_ordered_as_numbers_and_other_names_are_none(tmp_path: Path) -> None:
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(step_folder(tmp_path, step), example())
    for name in ("step-best", "step-", "step-5.old", "superseded-step-2000000"):
        save_checkpoint(tmp_path / "checkpoints" / name, example())
    assert find_newest_checkpoint(tmp_path) == (step_folder(tmp_path, 1_000_000), [])
    prune_checkpoints(tmp_path, keep=1)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-1000000", "step-best", "step-", "step-5.old", "superseded-step-2000000"}
    assert find_checkpoint(tmp_path / "checkpoints" / "step-best").folder.name == "step-best", "one may name it"


def test_pruning_leaves_links_and_what_they_point_to(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "elsewhere", example())
    for step in (1, 2, 3):
        save_checkpoint(step_folder(tmp_path, step), example())
    step_folder(tmp_path, 0).symlink_to(tmp_path / "elsewhere")
    prune_checkpoints(tmp_path, keep=1)
    load_checkpoint(tmp_path / "elsewhere")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000", "step-000003"]


def test_a_pruning_that_is_killed_leaves_no_half_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save_checkpoint(step_folder(tmp_path, step), example())
    (step_folder(tmp_path, 1) / MANIFEST).unlink()  # left so by an earlier version

    def killed(folder: Path, **_: object) -> None:
        (folder / MANIFEST).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("d2l.io.atomic.shutil.rmtree", killed)
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            prune_checkpoints(tmp_path, keep=2)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        load_checkpoint(folder)
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
