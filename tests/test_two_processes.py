"""Two processes on CPUs train as one does with as many micro-batches, and agree on the folder and on when to stop."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.forked import run_forked
from support.launch import run_here, train_alone
from support.tiny_model import random_rows, tiny_model
from support.two_processes import HELDOUT, config_for, main

from d2l.checkpoint import load_checkpoint
from d2l.io.run_folder import EVALUATIONS, METRICS, step_folder
from d2l.train.autopsy import read_autopsy
from d2l.train.events import read_events
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import MEASURED
from d2l.train.watch import Watch


def start_by_torchrun(folder: Path) -> None:
    """Run `two_processes.py` as its users start a run."""
    script = Path(__file__).parent / "support" / "two_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(list(map(str, launch)), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


def fork(folder: Path) -> None:
    """Run it in processes that need no start."""
    run_forked(partial(main, folder), 2, folder)


@pytest.mark.parametrize("start", [fork, pytest.param(start_by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(start: Callable[[Path], None], tmp_path: Path) -> None:
    start(tmp_path)
    folder = tmp_path / "run"
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [note["folder"] for note in notes] == [str(folder)] * 2
    by_base, by_weights = notes[1]["refused"]
    assert notes[0]["refused"] == [by_base, by_weights]  # every process says the same
    first, second = (read_autopsy(folder / name) for name in ("autopsy", "autopsy-2"))
    assert by_base.startswith("step 4, rank 1 (records 4, 2, 4, 2): the loss is nan")
    assert by_weights.startswith("after the update of step 3, rank 1 (records")
    assert [it.rank for it in (first, second)] == [1, 1]
    assert first.suspects[0].module == "base.model.layers.2.self_attn.o_proj"
    assert second.suspects[0].module == "hypernet.head"
    assert first.command.startswith("torchrun --nproc-per-node 2 -m cli train ")

    assert all(note["buckets"] > 3 for note in notes)

    config = config_for(processes=1)
    alone = Trainer(tiny_model(config), random_rows(), config)
    with pytest.warns(UserWarning, match="the first step's loss"):  # of a LoRA that does not begin at zero
        assert len(list(train_steps(alone, tmp_path, Watch(alone, tmp_path, HELDOUT)))) == 3
    assert [event.text[:21] for event in read_events(folder)][:1] == ["the first step's loss"]
    for name, count in ((METRICS, 3), (EVALUATIONS, 2)):
        lines, expected = (
            [json.loads(line) for line in (place / name).read_text().splitlines()] for place in (folder, tmp_path)
        )
        assert len(lines) == len(expected) == count
        for ours, theirs in zip(lines, expected, strict=True):
            wanted = {key: value for key, value in theirs.items() if key not in MEASURED}
            found = {key: value for key, value in ours.items() if key not in MEASURED}
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    trained = load_checkpoint(step_folder(folder, 3))
    first, expected = (load_checkpoint(step_folder(it, 3)).state["first_step"] for it in (folder, tmp_path))
    assert first["predicted"] == pytest.approx(expected["predicted"], rel=1e-4)
    assert first["measured"]["context_tokens"] == expected["measured"]["context_tokens"]
    for name, value in alone.model.hypernet.state_dict().items():
        torch.testing.assert_close(trained.hypernet[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_four_processes_train_as_one_does(tmp_path: Path) -> None:
    """By loss and gradient norm: four numbers are summed in another order, and Adam makes the sign of a tiny one a step."""
    slow = {"learning_rate": 0.001}
    assert [note["code"] for note in run_here(tmp_path, 4, config=slow)] == [0] * 4
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    expected, _ = train_alone(processes=4, **slow)
    assert len(lines) == len(expected)
    for ours, theirs in zip(lines, expected, strict=True):
        for key in ("ce_loss", "grad_norm", "gen_lora_l1_norm", "tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (key, ours["step"])
