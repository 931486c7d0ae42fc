"""Processes of one group, forked from that of the tests: torchrun would let each of them import everything anew."""

import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from torch import distributed
from torch.distributed import TCPStore

PATIENCE = 120.0  # seconds for all of them together


def run_forked(task: Callable[[], None], processes: int, folder: Path) -> None:
    """Run a task in each of so many processes, which find what torchrun would tell them in their environment.

    Their output goes to `folder`, and into the error of a process that fails, behind which the others are ended.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"},
    }
    logs = [folder / f"output of {rank}.txt" for rank in range(processes)]
    running = {}
    for rank, log in enumerate(logs):
        if (number := os.fork()) == 0:
            _run(task, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
        running[number] = log
    end = time.monotonic() + PATIENCE
    try:
        while running and time.monotonic() < end:
            for number, log in list(running.items()):
                ended, status = os.waitpid(number, os.WNOHANG)
                if ended:
                    del running[number]
                    assert status == 0, log.read_text(encoding="utf-8")
            time.sleep(0.02)
        assert not running, "".join(log.read_text(encoding="utf-8") for log in logs)
    finally:
        for number in running:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)


def _run(task: Callable[[], None], environment: dict[str, str], log: Path) -> None:
    """Run the task, and end this process without what pytest would do at its end."""
    code = 1
    gc.freeze()  # what the tests have made is neither collected nor copied here
    with log.open("w", encoding="utf-8") as file:
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            sys.stdout = sys.stderr = file
            os.environ.update(environment)
            warnings.simplefilter("default")  # pytest's filter makes them errors
            PartialState._reset_state()  # which may say that there is one process
            task()
            if distributed.is_initialized():
                distributed.destroy_process_group()
            code = 0
        except BaseException:
            traceback.print_exc(file=file)
        finally:
            file.flush()
            os._exit(code)
