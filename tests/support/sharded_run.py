"""What `test_sharding.py` starts, by torchrun: the same run with a base that is sharded and with one that is not.

python -m torch.distributed.run --standalone --nproc-per-node N tests/support/sharded_run.py FOLDER SETTINGS

SETTINGS is JSON, a list of runs: `name`, `family` of the base, `base` (of its config), `config` (of the run) and
`faults` to plant behind its last step. Each process leaves a note as RANK.json.
"""

import ctypes
import gc
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from d2l.base.config import read_base_config
from d2l.build import build_base
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch
from d2l.errors import NonFiniteError
from d2l.hypernet.model import DocToLora
from d2l.train.diagnosis import autopsy_on_refusal
from d2l.train.loop import Trainer, batch_loss, train_steps
from d2l.train.processes import process_group, processes
from d2l.train.watch import Watch
from support.tiny_model import around_base, base_config, random_rows, run_config

HELDOUT = [random_rows(5, seed=9)]
RARE = 20  # a token that the document of record 5 alone holds
STEPS = {"max_steps": 3, "save_steps": 100, "eval_steps": 2, "expert_weights": "dequantize"}


def settings_of(run: dict[str, Any], folder: Path, micro_batches: int, **changes: Any) -> RunConfig:
    """Return a run's configuration; a family's base is random, of a config file that lies in the folder."""
    place = {"model_name_or_path": str(folder / f"{run['name']}.json")} if "family" in run else {}
    return run_config(**STEPS | place | {"gradient_accumulation_steps": micro_batches} | run["config"] | changes)


def write_base(run: dict[str, Any], folder: Path) -> None:
    """Write the config file of a run's base."""
    if "family" in run:
        text = base_config(run["family"], **run.get("base", {})).to_json_string()
        (folder / f"{run['name']}.json").write_text(text, encoding="utf-8")


def trainer_for(config: RunConfig, base: PreTrainedModel) -> Trainer:
    """Make a trainer whose LoRAs are not zero."""
    return Trainer(around_base(base, config), random_rows(), config)


def main(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Take the runs, and leave the note."""
    this = processes()
    notes = {}
    for run in runs:
        if this.is_main_process:
            write_base(run, folder)
        this.wait_for_everyone()
        notes[run["name"]] = {kind: train(run, folder, kind) for kind in ("none", "full")}
    (folder / f"{this.process_index}.json").write_text(json.dumps(notes), encoding="utf-8")


def train(run: dict[str, Any], folder: Path, kind: str) -> dict[str, Any]:
    """Train with a base that is held so, and say what was seen."""
    place = folder / run["name"] / kind
    place.mkdir(parents=True, exist_ok=True)
    config = settings_of(run, folder, 1, base_sharding=kind)
    before = resident()
    base = build_base(config, read_base_config(config.model_name_or_path), processes().num_processes)
    note: dict[str, Any] = {"loading": resident("VmHWM") - before, "resident": resident() - before}
    trainer = trainer_for(config, base)
    batch = trainer._epoch_batches()[0]
    for _ in train_steps(trainer, place, Watch(trainer, place, HELDOUT)):
        pass
    note |= {"share": share(base), "whole": [whole_layers(base), after_reading(trainer.model, batch)]}
    weights = {name: it.clone() for name, it in trainer.model.hypernet.state_dict().items()}
    torch.save(weights, place / f"{processes().process_index}.pt")
    note["refused"] = {fault: refused(trainer, place / fault, fault) for fault in run.get("faults", ())}
    return note


def share(base: PreTrainedModel) -> float:
    """Return the share of the base's bytes that this process holds."""
    local = [it.to_local() if isinstance(it, DTensor) else it for it in base.parameters()]
    return sum(it.numel() for it in local) / sum(it.numel() for it in base.parameters())


def whole_layers(base: PreTrainedModel) -> list[int]:
    """Return the layers of which this process holds whole weights."""
    layers: nn.ModuleList = base.get_decoder().layers
    return [n for n, layer in enumerate(layers) if not all(isinstance(it, DTensor) for it in layer.parameters())]


def after_reading(model: DocToLora, batch: PackedBatch) -> list[int]:
    """Read documents, and return the layers that are whole behind it."""
    model.features(batch.to(processes().device))
    return whole_layers(model.base)


def refused(trainer: Trainer, folder: Path, fault: str) -> str:
    """Plant a fault, and return what the next step says."""
    folder.mkdir(exist_ok=True)
    place = trainer.epoch, trainer.position
    loss = partial(batch_loss, trainer.model, config=trainer.config)
    try:
        with plant(trainer, fault), autopsy_on_refusal(trainer, folder, loss):
            trainer.step()
    except NonFiniteError as error:
        return str(error)
    finally:
        trainer.epoch, trainer.position = place
    return ""


@contextmanager
def plant(trainer: Trainer, fault: str) -> Iterator[None]:
    """Spoil one record's document, a gradient in the last process, or a weight of the base in the last one's share."""
    hypernet, base = trainer.model.hypernet, trainer.model.base

    def spoil_rare_token(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == RARE)[..., None], math.inf)

    def spoil_gradient(gradient: Tensor) -> Tensor:
        return gradient * (math.nan if processes().is_last_process else 1)

    if fault == "weight":
        weight = trainer.model.targets["q_proj"][-1].weight
        if not isinstance(weight, DTensor):
            weight.chunk(processes().num_processes)[-1].fill_(math.nan)
        elif processes().is_last_process:
            weight.to_local().fill_(math.nan)
        yield
        return
    with (
        base.get_input_embeddings().register_forward_hook(spoil_rare_token)
        if fault == "record"
        else hypernet.get_parameter("scaler_A.q_proj").register_hook(spoil_gradient)
    ):
        yield


def resident(key: str = "VmRSS") -> float:
    """Return the MiB that this process occupies, or its highest mark since the last call without a key."""
    if key == "VmRSS":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the mark
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
