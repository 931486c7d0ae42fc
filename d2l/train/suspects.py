"""Suspects of a refused step: what the guard that fired has to look at, the first one first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from d2l.base.sharding import is_sharded
from d2l.data.packing import PackedBatch
from d2l.hypernet.model import DocToLora
from d2l.train.autopsy import Alone, Seen, Suspect, Values
from d2l.train.guards import LABELS, STATE, find_spoilt
from d2l.train.processes import OneProcess, is_of_connection
from d2l.train.random_state import random_state, restore_random_state
from d2l.train.replay import BatchLoss, Replay, StepInputs, measure, replay, split_contexts

T = TypeVar("T")

DATA, UPDATE, START, NORM = "data", "update", "start", "gradient norm"
FOLLOWING = 8  # tensors that are kept of the trail behind the first bad one
_MOST = 5  # suspects that are listed
_FINITE = "the replay in this process was finite: another process's batch, or a fault of hardware"
# Modules of the hypernetwork whose outputs have an axis of the base's layers: [n, layers, ...]
_BY_LAYER = ("hypernet", "hypernet.aggregator", "hypernet.head")


class RefusedRun(Protocol):
    """What is examined of a trainer whose step was refused."""

    model: DocToLora
    optimizer: torch.optim.AdamW
    processes: PartialState | OneProcess
    inputs: StepInputs | None
    step_number: int


@dataclass(frozen=True)
class Examination:
    """What was found in this process.

    Attributes:
        suspects: the first one first.
        replay: how the replay ended, in words.
        alone: what each record does by itself.
        trail: what a replay saw up to the first bad tensor, and a few behind it.
        out_of_step: whether the other processes wait for a part of the base that this one no longer hands out.
    """

    suspects: Sequence[Suspect] = ()
    replay: str = "not replayed: the guard itself names the place"
    alone: Sequence[Alone] = ()
    trail: Sequence[Seen] = ()
    out_of_step: bool = False


def examine(run: RefusedRun, guard: str, loss: BatchLoss) -> Examination:
    """Find the suspects of a refused step in this process; the replay leaves no gradients, and random state as it was.

    Of a sharded base each process holds a share, so all of them replay equally often, also those whose own batch is sound.

    Args:
        run: as the guard left it: a step's inputs, and the weights and moments before it.
        guard: which one fired; see `d2l.train.guards`.
        loss: the run's own loss of a micro-batch.

    Raises:
        RuntimeError: another process of a sharded base is gone.
    """
    if guard == STATE:
        return Examination(_suspects_of_update(run))
    if run.inputs is None:
        return Examination()
    batches = run.inputs.batches[run.processes.process_index :: run.processes.num_processes]
    if guard == LABELS:
        records = tuple(sorted(record for batch in batches for record in batch.record_ids))
        what = "every label is -100: nothing is supervised"
        return Examination([Suspect(DATA, "", "labels", None, records, what)])
    before = random_state()
    try:
        return _replay_step(run.model, batches, run.inputs, loss)
    except RuntimeError as error:  # out of memory above all: hooks keep more alive than a step does
        if is_of_connection(error):
            raise
        what = f"the replay failed: {type(error).__name__}: {error}"
        return Examination(replay=what, out_of_step=is_sharded(run.model.base))
    finally:
        restore_random_state(before)
        run.model.hypernet.zero_grad(set_to_none=True)


def _suspects_of_update(run: RefusedRun) -> list[Suspect]:
    """Name the weights and moments that an update has spoilt, or that a run began with."""
    suspects = []
    found = find_spoilt(run.model.hypernet.named_parameters(), run.optimizer)
    for it in found:
        owner, _, own = f"hypernet.{it.parameter}".rpartition(".")
        what = f"largest absolute value {it.size:.3g}"
        if it.moment:
            what += "; a moment that is not finite freezes its weight or spoils it"
        tensor = f"{it.moment} of {own}" if it.moment else own
        suspects.append(Suspect(UPDATE if run.inputs else START, owner, tensor, None, (), what))
    rate = 0.0 if run.inputs is None else run.inputs.learning_rate
    if rate > 1 and suspects and not found[0].moment:  # an update of AdamW moves a weight by about the learning rate
        what = f"{rate:.3g}, and an update moves a weight by about as much"
        suspects.insert(0, Suspect(UPDATE, "", "learning rate", None, (), what))
    return suspects[:_MOST]


def _replay_step(model: DocToLora, batches: Sequence[PackedBatch], inputs: StepInputs, loss: BatchLoss) -> Examination:
    """Replay the micro-batches of this process to the first one that fails, then its records one at a time."""
    model.hypernet.zero_grad(set_to_none=True)
    for batch in batches:
        whole = replay(model, batch, inputs, loss, in_step=is_sharded(model.base))
        if any(_of_all(model, whole.failed)):
            break
    else:
        return Examination(replay=_FINITE)
    overflow = _largest_gradient(model) if whole.failed and all(it.values.finite for it in whole.seen) else []
    parts = [part for each in batches for part in split_contexts(each)]
    replays = _replay_records(model, parts, whole, inputs, loss)
    usual = {_place(it) for one in replays if not one.failed for it in one.seen if not it.values.finite}
    guilty = tuple(sorted(part.record_ids[0] for part, one in zip(parts, replays, strict=True) if one.failed))
    records = (
        guilty if len(parts) == 1 or len(guilty) < len(parts) else ()
    )  # what all of them show is no record's doing
    bad = [it for it in whole.seen if not it.values.finite and _place(it) not in usual]
    weights = _measure_weights(model, bad[0].module if bad else "")
    if not whole.failed:
        return Examination(replay=_FINITE)
    suspects = [*_suspects_in_data(parts), *_suspects_on_the_way(bad, weights, records), *overflow]
    end = whole.seen.index(bad[0]) + 1 + FOLLOWING if bad else len(whole.seen)
    return Examination(
        suspects=suspects[:_MOST],
        replay="the replay in this process failed as the step did",
        alone=[_alone(part.record_ids[0], one, usual) for part, one in zip(parts, replays, strict=True)],
        trail=whole.seen[:end],
    )


def _replay_records(
    model: DocToLora, parts: Sequence[PackedBatch], whole: Replay, inputs: StepInputs, loss: BatchLoss
) -> list[Replay]:
    """Replay each record by itself; the replay of all is that of one that is alone."""
    most = max(_of_all(model, len(parts)))
    if most == 1:
        return [whole]
    replays = []
    for part in [*parts, *[parts[-1]] * (most - len(parts))]:  # its shares of the base are needed to the end
        model.hypernet.zero_grad(set_to_none=True)
        replays.append(replay(model, part, inputs, loss, in_step=is_sharded(model.base)))
    return replays[: len(parts)]


def _of_all(model: DocToLora, value: T) -> list[T]:
    """Return the values of the processes that hold the base together: of all, or of this one alone."""
    return gather_object([value]) if is_sharded(model.base) else [value]


def _measure_weights(model: DocToLora, module: str) -> dict[str, Values]:
    """Measure a module's own weights and buffers; of a sharded base each process names a module, and all gather each."""
    measured: dict[str, Values] = {}
    modules = dict(model.named_modules())
    for name in dict.fromkeys(_of_all(model, module)):
        owner = modules.get(name, nn.Identity())
        own = {**dict(owner.named_parameters(recurse=False)), **dict(owner.named_buffers(recurse=False))}
        tensors = {key: it.full_tensor() if isinstance(it, DTensor) else it for key, it in own.items()}
        if name == module:
            measured = {key: measure(it) for key, it in tensors.items() if it.is_floating_point()}
    return measured


def _alone(record: int, one: Replay, usual: set[tuple[str, str, str]]) -> Alone:
    """Say what a record does by itself."""
    first = next((it for it in one.seen if not it.values.finite and _place(it) not in usual), None)
    return Alone(record, not one.failed, str(first) if first and one.failed else "")


def _place(seen: Seen) -> tuple[str, str, str]:
    """Return what identifies a tensor: what sound records show there too, such as logits of -inf, is no suspect."""
    return seen.phase, seen.module, seen.tensor


def _suspects_in_data(parts: Sequence[PackedBatch]) -> list[Suspect]:
    """Name records whose teacher gives no number; log-probabilities of -inf are those of p = 0."""
    return [
        Suspect(DATA, "", "logprobs_vals", None, part.record_ids, str(measure(values)))
        for part in parts
        if (values := part.logprobs_vals) is not None and not bool((values < torch.inf).all())
    ]


def _suspects_on_the_way(bad: Sequence[Seen], weights: Mapping[str, Values], records: tuple[int, ...]) -> list[Suspect]:
    """Name the weight that the first bad tensor was made with, where that is bad itself, then bad tensors in order."""
    suspects = []
    for name, values in weights.items():
        if not values.finite:
            layer = _layer(bad[0].module, ())
            suspects.append(Suspect(bad[0].phase, bad[0].module, name, layer, records, str(values)))
    for it in {(it.phase, it.module): it for it in reversed(bad)}.values():
        layer = _layer(it.module, it.values.first)
        suspects.append(Suspect(it.phase, it.module, it.tensor, layer, records, str(it.values)))
    in_order = {(it.phase, it.module): number for number, it in reversed([*enumerate(bad)])}
    return sorted(suspects, key=lambda it: in_order[it.phase, it.module])


def _largest_gradient(model: DocToLora) -> list[Suspect]:
    """Name the parameter with the largest gradient, of gradients that are finite and whose norm is not."""
    sizes = {
        name: float(nn.utils.get_total_norm([parameter.grad], torch.inf))
        for name, parameter in model.hypernet.named_parameters(prefix="hypernet")
        if parameter.grad is not None
    }
    name = max(sizes, key=lambda it: sizes[it])
    owner, _, own = name.rpartition(".")
    what = f"largest absolute value {sizes[name]:.3g}: finite, but the sum of the squares is not"
    return [Suspect(NORM, owner, f"gradient of {own}", None, (), what)]


def _layer(module: str, first: tuple[int, ...]) -> int | None:
    """Return the base's layer that a tensor belongs to, by its module's name or by its first bad index."""
    if named := re.match(r"base\.(?:.*\.)?layers\.(\d+)", module):
        return int(named[1])
    return first[1] if module in _BY_LAYER and len(first) > 1 else None
