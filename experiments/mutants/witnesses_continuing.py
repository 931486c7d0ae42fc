"""Witnesses of runs that go on: what refuses to resume one, snapshots, and adapters of a smaller rank."""

from dataclasses import replace

import torch

from d2l.build import Components
from d2l.checkpoint import Checkpoint, take_snapshot
from d2l.config.schema import RunConfig
from d2l.fingerprint import run_fingerprint
from d2l.hypernet.lora import Lora
from d2l.inference.low_rank import refactor, relative_error
from d2l.train.changes import compare_configs, compare_inputs
from experiments.mutants.values import Values
from experiments.mutants.workbench import document_records, llama_config


def continuing(values: Values) -> None:
    """Compare runs whose processes, settings, records or base differ."""
    then = RunConfig(**llama_config().model_dump() | {"gradient_accumulation_steps": 4})
    for title, processes, now in (
        ("same", 1, then),
        ("twice", 2, then),
        ("shared", 2, then.model_copy(update={"gradient_accumulation_steps": 2})),
        ("rate", 1, then.model_copy(update={"learning_rate": 1e-5})),
        ("loss", 1, then.model_copy(update={"loss": "kl"})),
        ("longer", 1, then.model_copy(update={"max_steps": then.max_steps + 5})),
        ("saved", 1, then.model_copy(update={"save_steps": 3})),
    ):
        found = compare_configs(then, now, {"step": 2, "processes": 1}, processes)
        values[title] = [f"{it.field} {it.was} {it.now}" for it in found]
    components, records = Components(then), document_records()[:3]
    first, last = replace(records[0], context="other"), replace(records[-1], responses=("other",))
    taught = replace(records[0], logprobs_vals=(((-0.5,),),), logprobs_indices=(((1,),),))
    base_config = components.base_config
    other_base = type(base_config).from_dict({**base_config.to_dict(), "rms_norm_eps": 1e-3})
    was = run_fingerprint(then, base_config, components.chat, records, {}).to_json()
    for title, base, some in (
        ("same inputs", base_config, records),
        ("first record", base_config, [first, *records[1:]]),
        ("last answer", base_config, [*records[:-1], last]),
        ("asked otherwise", base_config, [replace(records[0], prompts=("other",)), *records[1:]]),
        ("taught", base_config, [taught, *records[1:]]),
        ("taught otherwise", base_config, [replace(taught, logprobs_indices=(((2,),),)), *records[1:]]),
        ("turned round", base_config, records[::-1]),
        ("other base", other_base, records),
    ):
        print_now = run_fingerprint(then, base, components.chat, some, {})
        values[title] = [it.field for it in compare_inputs(was, print_now)]
        values[f"{title} data"] = [print_now.parts["data"][:9]]


def snapshot(values: Values) -> None:
    """Take a snapshot, and change what it was taken of."""
    weight, moment, state = torch.ones(2, 3), torch.ones(4), {"step": 1, "nested": {"stage": 0}}
    taken = take_snapshot(Checkpoint({"weight": weight}, {"moment": moment}, state))
    weight.add_(1)
    moment.add_(1)
    state["nested"]["stage"] = 1  # type: ignore[index]
    values["weight"], values["moment"] = taken.hypernet["weight"].clone(), taken.trainer["moment"].clone()
    values["state"] = [taken.state["nested"]["stage"]]


def smaller_rank(values: Values) -> None:
    """Find the nearest LoRAs of smaller and larger ranks, of one context and of two."""
    generator = torch.Generator().manual_seed(0)
    A, B = ({"q_proj": torch.randn(2, 2, 5, size, generator=generator)} for size in (7, 6))
    lora = Lora(A, B, 2.0)
    for rank in (1, 3, 5, 8):
        nearest = refactor(lora, rank)
        values[f"{rank} A"], values[f"{rank} B"] = nearest.A["q_proj"], nearest.B["q_proj"]
        values[f"{rank} error"] = [round(relative_error(nearest, lora), 6)]
