"""Witnesses of runs in several processes: gradients that are summed, steps that are shared, and a base that is sharded."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from checks.processes import LOOPBACK
from d2l.base.config import read_base_config
from d2l.base.layers import decoder_layers
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.build import Components, build_base, build_model
from d2l.config.schema import RunConfig
from d2l.train import gradients
from d2l.train.loop import Trainer
from d2l.train.metrics import MEASURED
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import SMALL, build
from experiments.mutants.witnesses_training import training_configs
from experiments.mutants.workbench import configurations

PROCESSES, PATIENCE = 2, timedelta(seconds=60)
Found = dict[str, Any]


def in_two_processes(task: Callable[[int], Found]) -> list[Found]:
    """Return what a task gives in this process, the first of a group, and in a forked second one; each is told its rank.

    `checks.processes.in_group` forks both: what they reach of a mutant would not be seen here.
    """
    with tempfile.TemporaryDirectory() as name:
        store = str(Path(name) / "store")
        other = get_context("fork").Process(target=_second, args=(task, store))
        other.start()
        try:
            return _member(task, store, 0)
        finally:
            other.kill()
            other.join()


def _second(task: Callable[[int], Found], store: str) -> None:
    """Do the task as the second process, and end without what the first one has registered to be done at its end."""
    try:
        _member(task, store, 1)
    finally:
        os._exit(0)


def _member(task: Callable[[int], Found], store: str, rank: int) -> list[Found]:
    """Join the group, do the task, and exchange what it gives."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    environment = {name: str(value) for name, value in places.items()}
    environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": LOOPBACK}
    with mock.patch.dict(os.environ, environment):
        file = distributed.FileStore(store, PROCESSES)
        distributed.init_process_group("gloo", store=file, rank=rank, world_size=PROCESSES, timeout=PATIENCE)
        found: list[Any] = [None] * PROCESSES
        distributed.all_gather_object(found, task(rank))
        distributed.destroy_process_group()
    return found


def _recorded(values: Values, title: str, found: list[Found]) -> None:
    """Record what each process found."""
    for rank, of_process in enumerate(found):
        values |= {f"{title} {rank} {name}": value for name, value in of_process.items()}


def summed(values: Values) -> None:
    """Sum gradients of unequal parameters in several buckets, one of which has a parameter without a gradient."""

    def task(rank: int) -> Found:
        parameters = [nn.Parameter(torch.ones(size)) for size in (5, 20, 3, 9, 30, 2)]
        with mock.patch.object(gradients, "BUCKET_BYTES", 64):
            sums = gradients.SummedGradients(parameters)
        with sums.during():
            used = [it * (rank + 2) * number for number, it in enumerate(parameters, start=1) if number != 3]
            torch.cat(used).square().sum().backward()
        return {str(number): it.grad for number, it in enumerate(parameters)}

    _recorded(values, "summed", in_two_processes(task))


def shared_steps(values: Values) -> None:
    """Take steps of two micro-batches in each of two processes, whose hypernetworks come from the run's seed."""
    config = RunConfig(**training_configs()["kl"].model_dump() | {"gradient_accumulation_steps": 2})
    rows = Components(config).rows

    def task(rank: int) -> Found:
        trainer = Trainer(build(config), rows, config)
        found: Found = {}
        for step in range(3):
            metrics = trainer.step().to_json()
            found |= {f"step {step} {key}": value for key, value in metrics.items() if key not in MEASURED}
        found |= {name: value.clone() for name, value in trainer.model.hypernet.state_dict().items()}
        return found | _weights(Components(config).model.hypernet, "fresh")

    _recorded(values, "shared", in_two_processes(task))


def sharded(values: Values) -> None:
    """Load two bases in shares, untied and tied, and take two steps over each."""
    for title in ("sharded", "sharded_llama"):
        config = configurations()[title]
        with tempfile.TemporaryDirectory() as folder:
            _save_base(config, Path(folder))
            small = SMALL | {"num_blocks": 1, "model_name_or_path": folder, "warmup_steps": 0}
            read = RunConfig(**config.model_dump() | small)
            rows = Components(config).rows[:4]
            _recorded(values, title, in_two_processes(lambda rank, read=read, rows=rows: _over_shares(read, rows)))


def _save_base(config: RunConfig, folder: Path) -> None:
    """Write a random base of a configuration's model."""
    base_config = read_base_config(config.model_name_or_path)
    random_base(base_config, plan_load(config, base_config, device="cpu"), seed=0).save_pretrained(folder)


def _over_shares(config: RunConfig, rows: Any) -> Found:
    """Load the base in shares and take two steps."""
    base = build_base(config, read_base_config(config.model_name_or_path), PROCESSES)
    named = list(base.named_parameters())
    found: Found = {
        "held": [_held(it) for _, it in named],
        "trainable": [name for name, it in named if it.requires_grad],
    }
    model = build_model(config, base)
    found |= _weights(model.hypernet, "fresh")
    trainer = Trainer(model, rows, config)
    counts: list[int] = []
    for layer in decoder_layers(base):
        layer.register_forward_pre_hook(lambda *_: counts.append(_whole(base)))
    for step in range(2):
        metrics = trainer.step()
        found |= {f"step {step} loss": metrics.task_loss, f"step {step} norm": metrics.grad_norm}
    return found | {"whole at once": counts, "held behind": [_held(it) for it in base.parameters()]}


def _held(parameter: torch.Tensor) -> int:
    """Count the values of a parameter that this process holds."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def _whole(base: PreTrainedModel) -> int:
    """Count the parameters that are whole in this process now."""
    return sum(not isinstance(it, DTensor) for it in base.parameters())


def _weights(module: nn.Module, title: str) -> Found:
    """Return a copy of a module's weights."""
    return {f"{title} {name}": value.detach().clone() for name, value in module.state_dict().items()}
