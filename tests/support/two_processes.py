"""What `test_two_processes.py` starts, by torchrun: a run of three steps, and a fourth that one process spoils: by a
weight of its base, and by one of its hypernetwork.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/support/two_processes.py FOLDER
"""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

from d2l.config.schema import RunConfig
from d2l.errors import NonFiniteError
from d2l.train import gradients
from d2l.train.diagnosis import autopsy_on_refusal
from d2l.train.loop import Trainer, batch_loss, train_steps
from d2l.train.processes import processes
from d2l.train.start import start_new
from d2l.train.watch import Watch
from support.tiny_model import random_rows, run_config, tiny_model

HELDOUT = [random_rows(5, seed=9)]


def config_for(processes: int) -> RunConfig:
    """Four micro-batches to a step, dealt out to so many processes: two for each of two."""
    return run_config(max_steps=3, gradient_accumulation_steps=4 // processes, eval_steps=2)


def main(output: Path) -> None:
    """Train in a new folder of `output`, and leave a note of what each process saw."""
    rank = processes().process_index
    time.sleep(0.5 * rank)  # the other process takes the folder before this one looks for a free one
    config = config_for(processes=2)
    with start_new(config.model_copy(update={"output_dir": str(output / "run")}), numbered=True) as start:
        train_in(start.folder, rank, config, output)


def train_in(folder: Path, rank: int, config: RunConfig, output: Path) -> None:
    """Take the steps, spoil the weights of one process, and leave the note."""
    (folder / f"seen by {rank}").touch()
    gradients.BUCKET_BYTES = 20_000  # several buckets for a tiny hypernetwork
    trainer = Trainer(tiny_model(config), random_rows(), config)
    buckets = len(gradients.SummedGradients([*trainer.model.hypernet.parameters()])._buckets)
    for _ in train_steps(trainer, folder, Watch(trainer, folder, HELDOUT)):
        pass
    refused = []
    for place in ("base.model.layers.2.self_attn.o_proj.weight", "hypernet.head.weight"):
        weight = trainer.model.get_parameter(place).data.view(-1)
        kept = weight[0].clone()
        weight[0] = math.nan if rank == 1 else kept
        loss = partial(batch_loss, trainer.model, config=config)
        try:
            with autopsy_on_refusal(trainer, folder, loss):
                trainer.step()
        except NonFiniteError as error:
            refused.append(str(error))
        weight[0] = kept
    note = {"folder": str(folder), "refused": refused, "buckets": buckets}
    (output / f"{rank}.json").write_text(json.dumps(note), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # a process that ends with the group's threads running is aborted now and then
    torch.distributed.destroy_process_group()
