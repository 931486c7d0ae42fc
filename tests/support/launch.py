"""Starts `launched_run.py` by torchrun, and reads what its processes noted."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2l.build import Components
from d2l.train.loop import Trainer
from support.tiny_run import tiny_config

SCRIPT = Path(__file__).with_name("launched_run.py")
CONFIG = {"max_steps": 6, "save_steps": 100, "gradient_accumulation_steps": 1, "needle_documents": 3}


def launch(
    folder: Path, settings: dict[str, Any], *options: str, prefix: Sequence[str] = (), cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start the run.

    Args:
        options: of torchrun.
        prefix: a command that starts it elsewhere.
        cwd: where it runs.
    """
    tests = SCRIPT.parents[1]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    settings = {**settings, "config": CONFIG | settings.get("config", {})}
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)]
    return subprocess.Popen(
        [*command, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd,
    )


def run_here(folder: Path, processes: int, **settings: Any) -> list[dict[str, Any]]:
    """Run to the end on this host, and return what every process noted."""
    started = launch(folder, settings, "--standalone", "--nproc-per-node", str(processes))
    said, _ = started.communicate(timeout=120)
    notes = [folder / f"{rank}.json" for rank in range(processes)]
    assert any(it.exists() for it in notes), said
    return [json.loads(it.read_text()) if it.exists() else {} for it in notes]


def train_alone(processes: int, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Take the same steps in this process, with the micro-batches of so many; return their metrics and the weights."""
    config = tiny_config(**CONFIG | {"gradient_accumulation_steps": processes} | changes)
    components = Components(config)
    trainer = Trainer(components.model, components.rows, config)
    metrics = [trainer.step().to_json() for _ in range(config.max_steps)]
    return metrics, dict(trainer.model.hypernet.state_dict())
