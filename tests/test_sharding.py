"""A base that is sharded over processes trains the same weights, bit for bit, as one that each of them holds whole."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import run_forked
from support.launch import run_here, train_alone
from support.random_runs import random_subject
from support.sharded_run import main, settings_of, trainer_for, write_base
from support.tiny_model import base_config, tiny_base

from checks.rules import RULES
from checks.rules.sharded_base_differs import SHARDED
from checks.runner import run_checks
from checks.subject import changed
from d2l.base.config import read_base_config
from d2l.base.load_plan import Choice, plan_load
from d2l.base.sharding import load_sharded_base, sharding_obstacle, sharding_units
from d2l.build import build_base
from d2l.checkpoint import load_checkpoint
from d2l.config.schema import RunConfig
from d2l.errors import ModelError
from d2l.io.run_folder import EVALUATIONS, step_folder
from d2l.train.autopsy import read_autopsy
from d2l.train.processes import process_group

CHECKPOINTED = {"name": "checkpointed", "family": "gpt_oss", "config": {"gradient_checkpointing": True}}
OTHERS: list[dict[str, Any]] = [
    {"name": "kept", "family": "gpt_oss", "config": {}},
    {"name": "early", "family": "llama", "config": {"ctx_encoder_type": "early_exit"}},
    {
        "name": "tied",
        "family": "llama",
        "base": {"tie_word_embeddings": True},
        "config": {"ctx_encoder_type": "concat_layers"},
    },
    {
        "name": "block",
        "family": "gpt_oss",
        "config": {"ctx_encoder_type": "embed_only", "target_modules": ["mlp", "q_proj"]},
    },
    {"name": "bfloat16", "family": "gpt_oss", "config": {"dtype": "bfloat16"}},
    {"name": "files", "config": {"model_name_or_path": "configs/models/needle_tiny"}},
]
# 12 layers of 16 MiB in float32
LARGE = {
    "name": "large",
    "family": "llama",
    "base": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
    | {"num_attention_heads": 8, "num_key_value_heads": 8},
    "config": {"target_modules": ["q_proj"]},
}


def fork_sharded(folder: Path, runs: list[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Run `sharded_run.py` in forked processes, and return the note of each."""

    def task() -> None:
        with process_group():
            main(folder, runs)

    run_forked(task, processes, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def run_sharded(folder: Path, runs: list[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Start `sharded_run.py` by torchrun, and return the note of each process."""
    script = Path(__file__).parent / "support" / "sharded_run.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": "262144",  # freed tensors go back to the system, so that resident memory is what is held
    }
    done = subprocess.run(
        [sys.executable, *launch, str(folder), json.dumps(runs)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def assert_equal_to_whole(folder: Path, run: dict[str, Any], processes: int) -> None:
    """Compare weights, checkpoint and evaluations of a sharded run with those of the other, and with one process's."""
    whole, sharded = (folder / run["name"] / kind for kind in ("none", "full"))
    expected = torch.load(whole / "0.pt")
    saved = load_checkpoint(step_folder(sharded, 3)).hypernet
    for rank in range(processes):
        weights = torch.load(sharded / f"{rank}.pt")
        assert weights.keys() == expected.keys() == saved.keys()
        for name, value in weights.items():
            assert torch.equal(value, expected[name]), name
            assert torch.equal(value, saved[name]), name
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (place / EVALUATIONS).read_text().splitlines()]
        for place in (whole, sharded)
    ]
    assert len(lines[0]) == 2
    assert lines[0] == lines[1]

    write_base(run, folder)
    config = settings_of(run, folder, processes)
    alone = trainer_for(config, build_base(config, read_base_config(config.model_name_or_path)))
    for _ in range(config.max_steps):
        alone.step()
    for name, value in alone.model.hypernet.state_dict().items():
        torch.testing.assert_close(expected[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("run", [fork_sharded, pytest.param(run_sharded, marks=pytest.mark.slow)])
def test_a_sharded_base_trains_the_same_weights(run: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    notes = run(tmp_path, [CHECKPOINTED], processes=2)
    assert_equal_to_whole(tmp_path, CHECKPOINTED, processes=2)
    for note in notes:
        whole, sharded = note["checkpointed"]["none"], note["checkpointed"]["full"]
        assert whole["share"] == 1
        assert sharded["share"] == pytest.approx(0.5, abs=0.01)
        assert whole["whole"] == [[0, 1, 2, 3]] * 2
        assert sharded["whole"] == [[], []]  # after a step, and after documents were read up to the last layer


@pytest.mark.slow
def test_a_sharded_base_is_autopsied_as_a_whole_one(tmp_path: Path) -> None:
    """Compare autopsies with each other, and with what was planted."""
    faults = ["record", "gradient", "weight"]
    notes = run_sharded(tmp_path, [CHECKPOINTED | {"faults": faults}], processes=2)
    folder, first = tmp_path / "checkpointed", {}
    for fault in faults:
        whole, sharded = (read_autopsy(folder / kind / fault / "autopsy") for kind in ("none", "full"))
        assert replace(sharded, checkpoint=None, command="") == replace(whole, checkpoint=None, command="")
        said = {note[folder.name]["full"]["refused"][fault] for note in notes}
        assert len(said) == 1
        assert str(sharded.suspects[0]) in said.pop()
        first[fault] = (
            sharded.rank,
            sharded.suspects[0].module,
            sharded.suspects[0].tensor,
            sharded.suspects[0].records,
        )
        assert not any(re.fullmatch(r"autopsy-\d", it.name) for it in (folder / "full" / fault).iterdir())
    assert first == {
        "record": (1, "base.model.embed_tokens", "output", (5,)),
        "gradient": (1, "hypernet.scaler_A", "gradient of q_proj", ()),
        "weight": (0, "base.model.layers.3.self_attn.q_proj", "weight", ()),
    }


@pytest.mark.slow
def test_bases_and_encoders_of_all_kinds_train_the_same_weights(tmp_path: Path) -> None:
    notes = run_sharded(tmp_path, OTHERS, processes=2)
    for run in OTHERS:
        assert_equal_to_whole(tmp_path, run, processes=2)
        for note in notes:
            assert 0.49 < note[run["name"]]["full"]["share"] < 0.55  # tied embeddings stay whole behind an evaluation
            assert note[run["name"]]["full"]["whole"] == [[], []]


@pytest.mark.slow
def test_weights_that_do_not_divide_are_shared_out_too(tmp_path: Path) -> None:
    run_sharded(tmp_path, [CHECKPOINTED], processes=3)
    assert_equal_to_whole(tmp_path, CHECKPOINTED, processes=3)


@pytest.mark.slow
def test_a_process_never_holds_the_whole_base(tmp_path: Path) -> None:
    """By resident memory; the first process reads the files, and holds the base until its shares are handed out."""
    first, second = (note["large"] for note in run_sharded(tmp_path, [LARGE], processes=2))
    assert second["none"]["resident"] > 190
    assert second["full"]["loading"] < 0.6 * second["none"]["loading"]
    for note in (first, second):
        assert note["full"]["resident"] < 0.57 * note["none"]["resident"]


@pytest.mark.slow
def test_a_run_shards_its_base_and_resumes_with_a_whole_one(tmp_path: Path) -> None:
    config = {"expert_weights": "dequantize"}
    stopped = run_here(tmp_path, 2, config=config | {"base_sharding": "full"}, signal=[0, 3])
    assert [note["code"] for note in stopped] == [12, 12], stopped
    notes = run_here(tmp_path, 2, config=config, resume=True)
    assert [note["code"] for note in notes] == [0, 0], notes
    _, expected = train_alone(processes=2, expert_weights="dequantize")
    trained = load_checkpoint(step_folder(tmp_path / "run", 6)).hypernet
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("crash", 1), ("die", None)])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, fault: str, code: int | None) -> None:
    config = {"base_sharding": "full", "expert_weights": "dequantize"}
    notes = run_here(tmp_path, 2, config=config, **{fault: [1, 2]})
    assert [note.get("code") for note in notes] == [13, code]
    assert "rank 0 of 2" in notes[0]["error"]


@pytest.mark.slow
def test_a_rank_that_cannot_replay_writes_its_autopsy_and_ends_the_others(tmp_path: Path) -> None:
    config = {"base_sharding": "full", "expert_weights": "dequantize"}
    first, second = run_here(tmp_path, 2, config=config, spoil=[1, 2])
    assert (first["code"], second["code"]) == (13, 11), (first, second)
    autopsy = read_autopsy(tmp_path / "run" / "autopsy")
    assert (autopsy.step, autopsy.rank, autopsy.suspects) == (3, 1, ())
    assert autopsy.replay == "the replay failed: OutOfMemoryError: planted"
    assert autopsy.replay in second["error"]


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({}, 2, "the experts would be held as packed, bytes that FSDP2 does not shard: set expert_weights: dequantize"),
        ({"expert_weights": "native"}, 2, "the experts would be held as native"),
        ({"expert_weights": "dequantize"}, 1, "this run has one process: start one for each GPU"),
        ({"expert_weights": "dequantize"}, None, ""),
        ({"expert_weights": "dequantize"}, 2, ""),
    ],
)
def test_what_cannot_be_sharded_is_said(changes: dict[str, str], processes: int | None, said: str) -> None:
    plan = plan_load(RunConfig(**changes), base_config(), device="cpu")
    found = sharding_obstacle(plan, processes)
    assert found.startswith(said) if said else not found


def test_other_quantizations_are_not_sharded() -> None:
    plan = replace(plan_load(RunConfig(), base_config("llama"), device="cpu"), quantization=Choice("fp8", ""))
    assert sharding_obstacle(plan, 2) == "weights in fp8 cannot be sharded: set base_sharding: none"


def test_a_base_that_cannot_be_sharded_is_refused_before_it_is_read() -> None:
    plan = plan_load(RunConfig(), base_config(), device="cpu")
    with pytest.raises(ModelError, match=r"^base_sharding: full: the experts would be held as packed"):
        load_sharded_base("nowhere", base_config(), plan, 0, processes=2)


def test_tied_embeddings_are_left_to_the_root() -> None:
    untied, tied = (tiny_base(None, "llama", tie_word_embeddings=it) for it in (False, True))
    assert len(sharding_units(untied)) == 4 + 2
    assert len(sharding_units(tied)) == 4


@pytest.mark.parametrize("seed", [5, 17])
def test_a_sharded_base_of_another_family_is_judged_the_whole_one(seed: int) -> None:
    """Take embeddings that are the head's, and a mixture of experts that is left early."""
    drawn = random_subject(seed)
    assert drawn.base_config.tie_word_embeddings or drawn.config.ctx_encoder_type == "early_exit"
    subject = replace(drawn, config=changed(drawn.config, **SHARDED))
    (outcome,) = run_checks(subject, RULES, select=("BAS203",)).outcomes
    assert (outcome.outcome, outcome.message[:33]) == ("pass", "2 steps over shares of 50% are th")
