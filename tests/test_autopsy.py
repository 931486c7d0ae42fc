"""Autopsies: for planted causes all over a step the first suspect is the planted one, and what is written and said."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import random_rows, run_config, tiny_model
from torch import Tensor, nn

from d2l.data.packing import PackedBatch
from d2l.data.tokenize import IGNORE_INDEX, Row
from d2l.errors import NonFiniteError
from d2l.hypernet.lora import Lora
from d2l.train.autopsy import Autopsy, newest_autopsy, read_autopsy
from d2l.train.loop import Trainer, train_steps

SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ONE_PACK: dict[str, Any] = {"max_packed_inp_len": 500, "max_packed_ctx_len": 500, "gradient_accumulation_steps": 1}
VICTIM, RARE = 3, 7  # the record, and the token, that only this record's document holds
PERCEIVER = "hypernet.aggregator.perceiver"


@dataclass(frozen=True)
class Cause:
    """A planted cause and its place.

    Attributes:
        plant: spoils a trainer before its next step.
        place: phase, module, tensor and layer of the first suspect, and its records.
        config: changes of the configuration.
        after: steps that are taken before.
        guard: the one that fires.
    """

    plant: Callable[[Trainer], object]
    place: tuple[str, str, str, int | None, tuple[int, ...]]
    guard: str = "loss"
    config: dict[str, Any] | None = None
    after: int = 0


def fill(parameter: str, value: float, *index: int) -> Callable[[Trainer], None]:
    """Put a value into a weight, at an index."""

    def plant(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.get_parameter(parameter)[index] = value

    return plant


def change_output(module: str, change: Callable[[Tensor], Tensor]) -> Callable[[Trainer], object]:
    """Change what a module returns."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return lambda trainer: trainer.model.get_submodule(module).register_forward_hook(hook)


def change_gradient(parameter: str, factor: float) -> Callable[[Trainer], object]:
    return lambda trainer: trainer.model.get_parameter(parameter).register_hook(lambda gradient: gradient * factor)


def spoil_expert(trainer: Trainer) -> None:
    """Give the rare token, and no other, the way to expert 0 of layer 0, and that expert a bias that is infinite."""
    layer: Any = trainer.model.base.get_submodule("model.layers.0")
    with torch.no_grad():
        embeddings = trainer.model.base.get_input_embeddings().weight
        embeddings[:, 0] = 0
        embeddings[RARE] = 0
        embeddings[RARE, 0] = 9
        layer.self_attn.o_proj.weight[0] = 0
        layer.self_attn.o_proj.bias[0] = 0
        layer.mlp.router.weight[0] = 0
        layer.mlp.router.weight[0, 0] = 1000
        layer.mlp.router.bias[0] = -1000
        layer.mlp.experts.down_proj_bias[0] = math.inf


def stretch_lora(trainer: Trainer) -> None:
    make = trainer.model.lora

    def stretched(batch: PackedBatch) -> Lora:
        lora = make(batch)
        return replace(lora, A={name: 1e6 * x for name, x in lora.A.items()}, scale=3e38)

    trainer.model.lora = stretched  # type: ignore[method-assign]


def spoil_teacher(trainer: Trainer) -> None:
    def spoilt(row: Row) -> Row:
        query = row.queries[0]
        assert query.logprobs_vals is not None
        vals = ((math.nan, *query.logprobs_vals[0][1:]), *query.logprobs_vals[1:])
        return replace(row, queries=(replace(query, logprobs_vals=vals), *row.queries[1:]))

    trainer.rows = [spoilt(row) if row.record == VICTIM else row for row in trainer.rows]


def mute(trainer: Trainer) -> None:
    trainer.rows = [
        replace(row, queries=tuple(replace(it, labels=(IGNORE_INDEX,) * len(it.labels)) for it in row.queries))
        for row in trainer.rows
    ]


def spoil_moment(trainer: Trainer) -> None:
    trainer.optimizer.state[trainer.model.hypernet.get_parameter("head.weight")]["exp_avg_sq"].view(-1)[5] = math.inf


def raise_rate(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e30
    trainer.scheduler._last_lr = [1e30, 1e30]


def exclude_label(trainer: Trainer) -> None:
    """Give the victim a label that nobody else has, and every logit of it the value -inf."""
    trainer.rows = [_with_label(row) if row.record == VICTIM else row for row in trainer.rows]
    change_output("base.lm_head", lambda x: x.index_fill(-1, torch.tensor([RARE]), -math.inf))(trainer)


def _with_label(row: Row) -> Row:
    query = row.queries[0]
    ids, labels = (*query.input_ids[:-1], RARE), (*query.labels[:-1], RARE)
    return replace(row, queries=(replace(query, input_ids=ids, labels=labels), *row.queries[1:]))


def divide_by_zero(x: Tensor) -> Tensor:
    return x + (0 * x).sqrt()  # the derivative of sqrt at 0 is infinite, and 0 times that is NaN


O_PROJ = f"{PERCEIVER}.decoder.layers.0.self_attn.o_proj"
CAUSES = {
    "an embedding of one document": Cause(
        fill("base.model.embed_tokens.weight", math.inf, RARE, 2),
        ("document pass", "base.model.embed_tokens", "weight", None, (VICTIM,)),
    ),
    "one expert that one document is routed to": Cause(
        spoil_expert,
        ("document pass", "base.model.layers.0.mlp.experts", "down_proj_bias", 0, (VICTIM,)),
        config={"target_modules": ("q_proj",)},  # a LoRA on o_proj would give other tokens the way
    ),
    "output of a layer overflows": Cause(
        change_output("base.model.layers.0.mlp", lambda x: x * 1e30 * 1e30),
        ("document pass", "base.model.layers.0.mlp", "output", 0, ()),
    ),
    "a weight that only questions pass": Cause(
        fill("base.model.layers.1.self_attn.o_proj.weight", math.nan, 0, 3),
        ("question pass", "base.model.layers.1.self_attn.o_proj", "weight", 1, ()),
    ),
    "perceiver": Cause(
        change_output(f"{PERCEIVER}.encoder.layers.0.mlp.down_proj", lambda x: x * 1e30 * 1e30),
        ("hypernetwork", f"{PERCEIVER}.encoder.layers.0.mlp.down_proj", "output", None, ()),
    ),
    "head of one layer": Cause(
        change_output("hypernet.head", lambda x: x.index_fill(1, torch.tensor([1]), math.inf)),
        ("hypernetwork", "hypernet.head", "output", 1, ()),
    ),
    "delta of the LoRA overflows": Cause(
        stretch_lora, ("question pass", "base.model.layers.0.self_attn.q_proj", "output with its LoRA", 0, ())
    ),
    "log of 0": Cause(exclude_label, ("loss", "", "task", None, (VICTIM,))),
    "L1 term overflows": Cause(  # in float32; the guard adds on the host
        lambda trainer: None,
        ("loss", "", "total", None, ()),
        guard="gradient norm",
        config={"gen_lora_l1_reg_coef": 1e300},
    ),
    "teacher without a number": Cause(
        spoil_teacher, ("data", "", "logprobs_vals", None, (VICTIM,)), config={"loss": "kl"}
    ),
    "no labels": Cause(mute, ("data", "", "labels", None, (0, 1, 2, 3, 4, 5)), guard="labels"),
    "square root at 0": Cause(
        change_output(O_PROJ, divide_by_zero),
        ("backward pass", O_PROJ, "gradient of weight", None, ()),
        guard="gradient norm",
    ),
    "gradient of one parameter": Cause(
        change_gradient("hypernet.scaler_A.q_proj", math.nan),
        ("backward pass", "hypernet.scaler_A", "gradient of q_proj", None, ()),
        guard="gradient norm",
    ),
    "norm of finite gradients overflows": Cause(
        change_gradient("hypernet.head.weight", 1e22),
        ("gradient norm", "hypernet.head", "gradient of weight", None, ()),
        guard="gradient norm",
    ),
    "learning rate": Cause(raise_rate, ("update", "", "learning rate", None, ()), guard="state"),
    "moment": Cause(
        spoil_moment, ("update", "hypernet.head", "exp_avg_sq of weight", None, ()), guard="state", after=1
    ),
    "weight of the hypernetwork": Cause(
        fill("hypernet.head.weight", math.nan, 0, 0, 0),
        ("update", "hypernet.head", "weight", None, ()),
        "state",
        after=1,
    ),
    "weight at the start": Cause(
        fill("hypernet.head.weight", 1e30, 0, 0, 0), ("start", "hypernet.head", "weight", None, ()), "state"
    ),
}
SLOW = ("norm of finite gradients overflows", "weight of the hypernetwork", "perceiver", "gradient of one parameter")


def rows_with_a_rare_token(top_k: int | None = None) -> list[Row]:
    """Six records; the victim's document alone holds the rare token."""

    def without(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token + (token == RARE) for token in ids)

    rows = [
        replace(
            row,
            chunks=tuple(map(without, row.chunks)),
            queries=tuple(
                replace(it, input_ids=without(it.input_ids), labels=without(it.labels)) for it in row.queries
            ),
        )
        for row in random_rows(top_k=top_k)
    ]
    victim = rows[VICTIM]
    rows[VICTIM] = replace(victim, chunks=((victim.chunks[0][0], RARE, *victim.chunks[0][2:]), *victim.chunks[1:]))
    return rows


def make_trainer(**changes: Any) -> Trainer:
    config = run_config(**ONE_PACK | changes)
    return Trainer(
        tiny_model(config, **SHALLOW), rows_with_a_rare_token(3 if changes.get("loss") == "kl" else None), config
    )


def stop(trainer: Trainer, folder: Path, cause: Cause) -> tuple[NonFiniteError, Autopsy]:
    """Take steps, plant the cause, go on until the run is stopped, and return the error and the autopsy."""
    steps = train_steps(trainer, folder)
    for _ in range(cause.after):
        next(steps)
    cause.plant(trainer)
    with pytest.raises(NonFiniteError) as raised:
        list(steps)
    newest = newest_autopsy(folder)
    assert newest is not None
    return raised.value, read_autopsy(newest)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(it, marks=[pytest.mark.slow] if it in SLOW else [], id=it.replace(" ", "-")) for it in CAUSES]
)
def test_the_first_suspect_is_the_planted_cause(tmp_path: Path, name: str, checkpointing: bool) -> None:
    cause = CAUSES[name]
    trainer = make_trainer(**{"gradient_checkpointing": checkpointing} | (cause.config or {}))
    error, autopsy = stop(trainer, tmp_path, cause)
    suspect = autopsy.suspects[0]
    assert (suspect.phase, suspect.module, suspect.tensor, suspect.layer, suspect.records) == cause.place
    assert error.guard == autopsy.guard == cause.guard
    assert str(suspect) in str(error)
