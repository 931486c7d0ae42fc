"""Witnesses of training: steps, resuming, losses, optimizers, guards and curricula."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2l.build import Components
from d2l.checkpoint import load_checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch, collate
from d2l.train.curriculum import Curriculum
from d2l.train.guards import require_finite_step
from d2l.train.loop import Trainer, train_steps
from d2l.train.losses import Normalizer, compute_loss
from d2l.train.metrics import MEASURED
from d2l.train.optimizer import make_optimizer, make_schedule, orthogonalize
from d2l.train.processes import OneProcess
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import SMALL, build, kinds, one_batch, refusal
from experiments.mutants.workbench import configurations, llama_config

CPU = torch.device("cpu")


def _train(config: RunConfig, steps: int, values: Values, name: str) -> Trainer:
    """Take some steps on the configuration's own data; keep metrics and weights."""
    trainer = Trainer(build(config, nonzero=True), Components(config).rows, config, OneProcess(CPU))
    for step in range(steps):
        if name == "curriculum" and step:
            trainer.curriculum._passing[0] = -1.0  # random weights answer nothing: the second step ends the first stage
        metrics = trainer.step().to_json()
        values |= {f"{name} step {step} {key}": value for key, value in metrics.items() if key not in MEASURED}
    values |= {f"{name} {key}": value.clone() for key, value in trainer.model.hypernet.state_dict().items()}
    values[f"{name} training"] = [trainer.model.hypernet.training, trainer.model.base.training]
    values[f"{name} trainable base"] = sum(p.requires_grad for p in trainer.model.base.parameters())
    values[f"{name} curriculum"] = trainer.curriculum.state()
    values[f"{name} position"] = [trainer.epoch, trainer.position, trainer.step_number]
    return trainer


def training_configs() -> dict[str, RunConfig]:
    """Return runs that together use every loss, both optimizers, accumulation, clipping and a curriculum."""
    both = configurations()
    needles = both["tiny_gpt_oss"].model_dump() | SMALL | {"num_blocks": 1, "lora_r": 2, "needle_documents": 6}
    budget = {"max_packed_inp_len": 200, "max_packed_ctx_len": 200}
    stages = [{"pairs": 1, "digits": 1, "passing": 0.5, "documents": 4}, {"pairs": 2, "digits": 1, "documents": 4}]
    # few blocks, few tokens: a step takes milliseconds
    kl = both["llama"].model_dump() | SMALL | {"num_blocks": 1, "warmup_steps": 1, "gradient_accumulation_steps": 3}
    return {
        "kl": RunConfig(**kl),
        "ce": RunConfig(**needles | budget | {"warmup_steps": 1, "weight_decay": 0.3, "max_grad_norm": 0.5}),
        "curriculum": RunConfig(
            **needles | budget | {"curriculum": stages, "muon_learning_rate": 0.02, "warmup_steps": 0}
        ),
    }


def train(values: Values) -> None:
    """Take steps of every kind of run."""
    for name, config in training_configs().items():
        _train(config, 5, values, name)


def resume(values: Values) -> None:
    """Save after three steps, read back, restore another trainer, and take two more; write a folder as a run does."""
    for name, config in training_configs().items():
        first = _train(config, 3, Values(), name)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / "saved", first.checkpoint(evidence=1))
            checkpoint = load_checkpoint(Path(folder) / "saved")
        values |= {f"{name} state {key}": value for key, value in checkpoint.state.items()}
        values |= {f"{name} trainer {key}": value for key, value in checkpoint.trainer.items()}
        second = Trainer(build(config, nonzero=False), Components(config).rows, config, OneProcess(CPU))
        torch.manual_seed(7)
        second.restore(checkpoint)
        values[f"{name} random"] = torch.rand(3)
        values[f"{name} curriculum"] = second.curriculum.state()
        for step in range(2):
            metrics = second.step().to_json()
            values |= {f"{name} step {step} {key}": value for key, value in metrics.items() if key not in MEASURED}
        values |= {f"{name} {key}": value for key, value in second.model.hypernet.state_dict().items()}
        lacking = {key: value for key, value in checkpoint.trainer.items() if "exp_avg_sq" not in key}
        broken = type(checkpoint)(checkpoint.hypernet, lacking, checkpoint.state)
        values[f"{name} lacking"] = refusal(lambda second=second, broken=broken: second.restore(broken))
    values |= _run_folder()


def _run_folder() -> Values:
    """Train in a folder, and list what is in it."""
    changes = {"max_steps": 5, "save_steps": 2, "save_total_limit": 2}
    config = RunConfig(**training_configs()["kl"].model_dump() | changes)
    trainer = Trainer(build(config), Components(config).rows, config, OneProcess(CPU))
    with tempfile.TemporaryDirectory() as name:
        steps = train_steps(trainer, Path(name))
        next(steps)
        first = [path.name for path in Path(name).glob("checkpoints/*")]
        for _ in steps:
            pass
        folders = sorted(path.name for path in Path(name).glob("checkpoints/*"))
        lines = len((Path(name) / "metrics.jsonl").read_text().splitlines())
        steps = [load_checkpoint(Path(name) / "checkpoints" / folder).state["step"] for folder in folders]
    return {"folders": folders, "first": first, "lines": lines, "steps": steps}


def losses(values: Values) -> None:
    """Compute losses and gradients of every kind on random logits, in two micro-batches."""
    config = configurations()["llama"]
    rows = Components(config).rows
    batches = [one_batch(config), collate([replace(row, chunks=row.chunks[:1]) for row in rows[3:5]])]
    model = build(kinds()["early_exit"])
    normalizer = Normalizer.of(batches, 2)
    values |= {"normalizer": list(vars(normalizer).values())}
    generator = torch.Generator().manual_seed(0)
    for number, batch in enumerate(batches):
        logits = torch.randn(len(batch.label_positions), 1024, generator=generator)
        logits[torch.arange(0, len(logits), 2), batch.labels[0, batch.label_positions][::2]] += 30
        first = batch.label_queries == 0
        logits[first, batch.labels[0, batch.label_positions][first]] += 30
        logits.requires_grad_()
        for kind in ("ce", "kl"):
            for mean in (False, True):
                made = model.lora(batch)
                loss = compute_loss(
                    logits, batch, made, normalizer, loss=kind, use_per_ctx_average_loss=mean, l1_coefficient=0.3
                )
                (gradient,) = torch.autograd.grad(loss.total, logits, retain_graph=True)
                bias = torch.autograd.grad(
                    loss.total, next(iter(model.hypernet.bias_A.values())), materialize_grads=True
                )[0]
                key = f"{number} {kind} {mean}"
                values |= {f"{key} gradient": gradient, f"{key} bias": bias}
                values[f"{key} terms"] = [
                    float(it.detach()) for it in (loss.task, loss.l1, loss.total, loss.exact_match)
                ]
    alone = PackedBatch(**{**_fields(batches[0]), "logprobs_vals": None, "logprobs_indices": None})
    values["no teacher"] = refusal(lambda: _kl(alone, normalizer, made))
    few = PackedBatch(**{**_fields(batches[0]), "logprobs_vals": batches[0].logprobs_vals[:1]})
    values["few rows"] = refusal(lambda: _kl(few, normalizer, made))
    none = PackedBatch(**{**_fields(batches[0]), "labels": torch.full_like(batches[0].labels, -100)})
    empty = compute_loss(torch.zeros(0, 1024), none, made, Normalizer(0, 0, 3, 2), use_per_ctx_average_loss=False)
    values["unlabelled"] = [float(empty.task), float(empty.exact_match)]


def _fields(batch: PackedBatch) -> dict[str, Any]:
    names = PackedBatch.__dataclass_fields__
    return {name: getattr(batch, name) for name in names}


def _kl(batch: PackedBatch, normalizer: Normalizer, made: Any) -> None:
    compute_loss(torch.zeros(len(batch.label_positions), 1024), batch, made, normalizer, loss="kl")


def optimizer(values: Values) -> None:
    """Take steps with given gradients by AdamW and Muon, and read every schedule's learning rates."""
    for muon in (None, 0.03):
        config = llama_config(**SMALL, muon_learning_rate=muon, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3)
        hypernet = build(config).hypernet
        optimizer = make_optimizer(hypernet, config)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for parameter in hypernet.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        values |= {f"{muon} {name}": value.clone() for name, value in hypernet.state_dict().items()}
        values[f"{muon} decay"] = [[group["weight_decay"], len(group["params"])] for group in optimizer.param_groups]
        for kind in ("cosine_with_min_lr", "constant_with_warmup", "linear", "warmup_stable_decay"):
            plan = {"lr_scheduler_type": kind, "warmup_steps": 4, "decay_steps": 6, "max_steps": 20, "min_lr": 1e-4}
            other = RunConfig(**config.model_dump() | plan)
            scheduled = make_optimizer(hypernet, other)
            schedule = make_schedule(scheduled, other)
            rates = []
            for _ in range(20):
                rates.append(list(schedule.get_last_lr()))
                scheduled.step()
                schedule.step()
            values[f"{muon} {kind}"] = torch.tensor(rates)
    values["orthogonal"] = orthogonalize(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4)))


def guards(values: Values) -> None:
    """Ask the guard about steps of every kind, and a trainer about a step without labels and one with NaN."""
    plain: dict[str, Any] = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "label_tokens": 3, "records": [1]}
    for key, value in (
        ("loss", float("nan")),
        ("loss", float("inf")),
        ("grad_norm", float("inf")),
        ("grad_norm", float("nan")),
        ("label_tokens", 0),
    ):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([1.0, float("nan")])
        given = plain | {key: value, "parameters": [("weight", parameter)]}
        values[f"{key} {value}"] = refusal(lambda given=given: require_finite_step(**given))
    config = training_configs()["kl"]
    for name, spoil in {"nan": torch.nan, "inf": torch.inf}.items():
        trainer = Trainer(build(config), Components(config).rows, config, OneProcess(CPU))
        before = {key: value.clone() for key, value in trainer.model.hypernet.state_dict().items()}
        trainer.model.hypernet.head.weight.register_hook(lambda gradient, spoil=spoil: gradient * spoil)
        values[f"trainer {name}"] = refusal(trainer.step)
        after = trainer.model.hypernet.state_dict()
        values[f"trainer {name} unchanged"] = all(torch.equal(value, after[key]) for key, value in before.items())


def curriculum(values: Values) -> None:
    """Observe answers over two stages, and restore the state."""
    config = training_configs()["curriculum"]
    state = Curriculum([stage.model_copy(update={"passing": 0.3}) for stage in config.stages])
    seen = [[state.observe(float(step % 3 > 0)), state.stage, state.average] for step in range(12)]
    other = Curriculum(config.stages)
    other.restore(state.state())
    values |= {"seen": torch.tensor(seen, dtype=torch.float64), "restored": [other.stage, other.average]}
