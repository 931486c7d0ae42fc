"""What tests start by torchrun, on one host or several: a tiny run without a preflight, with a fault at a step.

torchrun … tests/support/launched_run.py FOLDER SETTINGS

SETTINGS is JSON: `config` (keys of the run's configuration), `resume`, `pause` and `timeout` (seconds), and faults, each
`[rank, step]`: `signal` (SIGTERM to itself), `crash` (an error of its own), `die` (SIGKILL), `spoil` (NaN as the loss of the
next step, which it has no memory to replay). A note of how the run ended comes into FOLDER as RANK.json, and the exit code
is that of `d2l train`.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli import _exit_code
from commands.stopped import STOPPED
from d2l.build import Components
from d2l.errors import D2LError
from d2l.fingerprint import run_fingerprint
from d2l.train import loop, processes, suspects
from d2l.train.losses import Loss
from d2l.train.run import train
from d2l.train.start import start_new, start_resumed, with_inputs
from d2l.train.stopping import StopRequest, stop_on_signals
from support.tiny_run import tiny_config


def run(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Train in FOLDER/run, and return what it was stopped by."""
    config = tiny_config(**settings["config"], output_dir=str(folder / "run"))
    rank = int(os.environ["RANK"])
    processes.TIMEOUT = timedelta(seconds=settings.get("timeout", processes.TIMEOUT.total_seconds()))

    def on_step(record: Mapping[str, float]) -> None:
        time.sleep(settings.get("pause", 0))
        at = [rank, record["step"]]
        if at == settings.get("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        if at == settings.get("crash"):
            raise ValueError("a fault of its own")
        if at == settings.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if at == settings.get("spoil"):
            spoil_next_step()

    stop = StopRequest()
    with (
        stop_on_signals(stop.receive),
        processes.process_group(),
        start_resumed(config, folder / "run") if settings.get("resume") else start_new(config, numbered=False) as start,
    ):
        parts = Components(config)
        start = with_inputs(start, run_fingerprint(config, parts.base_config, None, parts.records, {}))
        return train(config, start, preflight={"fingerprint": "", "summary": {}}, on_step=on_step, stop=stop)


def spoil_next_step() -> None:
    """Make every loss that this process takes from now on NaN, and every replay fail."""
    sound = loop.batch_loss

    def spoilt(*args: Any) -> Loss:
        made = sound(*args)
        return replace(made, total=made.total * math.nan, task=made.task * math.nan)

    def fail(*args: Any, **options: Any) -> NoReturn:
        raise torch.OutOfMemoryError("planted")

    loop.batch_loss, suspects.replay = spoilt, fail


def main(folder: Path, settings: Mapping[str, Any]) -> int:
    """Run, leave the note, and return the exit code."""
    note: dict[str, Any] = {}
    code = 0
    try:
        note["stopped by"] = run(folder, settings)
        code = STOPPED if note["stopped by"] else 0
    except D2LError as error:
        note["error"], code = str(error), _exit_code(error)
    except ValueError as error:
        note["error"], note["notes"], code = str(error), error.__notes__, 1
    note |= {"code": code, "group": processes.distributed.is_initialized()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(note), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
