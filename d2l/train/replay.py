"""Replay of a micro-batch with every module watched: where its first value that is not finite came from.

Hooks on modules see the forward pass, hooks on their inputs, outputs and parameters the backward pass. A replay changes
no weight; it leaves gradients behind.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2l.data.packing import PackedBatch
from d2l.hypernet.model import DocToLora
from d2l.train.autopsy import Seen, Values
from d2l.train.losses import Loss, Normalizer
from d2l.train.random_state import restore_random_state

DOCUMENT, HYPERNETWORK, QUESTION, LOSS, BACKWARD = (
    "document pass",
    "hypernetwork",
    "question pass",
    "loss",
    "backward pass",
)

BatchLoss = Callable[[PackedBatch, Normalizer], Loss]


@dataclass(frozen=True)
class StepInputs:
    """All that a step depends on beside weights, moments and configuration.

    Attributes:
        step: number of the step.
        batches: the micro-batches of all processes, on the CPU.
        normalizer: counts of the whole step.
        learning_rate: the largest one of the step.
        random: `random_state` before its first forward pass.
    """

    step: int
    batches: Sequence[PackedBatch]
    normalizer: Normalizer
    learning_rate: float
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class Replay:
    """What a replay saw.

    Attributes:
        seen: every output, and every gradient, in the order of the computation.
        failed: whether the loss or a gradient of the hypernetwork is not finite.
    """

    seen: Sequence[Seen]
    failed: bool


def replay(
    model: DocToLora, batch: PackedBatch, inputs: StepInputs, loss: BatchLoss, *, in_step: bool = False
) -> Replay:
    """Compute the loss of a micro-batch and, where it is finite, its gradients, with every module watched.

    Args:
        batch: one of the step's, or a part of one; on the CPU.
        inputs: of the step; its counts and random state are used.
        loss: the run's own.
        in_step: run the backward pass in any case, as the processes of a sharded base do; what it shows of a loss that is
            not finite is left out.
    """
    restore_random_state(inputs.random)
    device = next(model.hypernet.parameters()).device
    with _Watch(model) as watch:
        made = loss(batch.to(device), inputs.normalizer)
        watch.phase = LOSS
        for name in ("task", "l1", "total"):
            watch.see("", name, getattr(made, name))
        failed = not watch.seen[-1].values.finite
        forward = len(watch.seen)
        if not failed or in_step:
            watch.phase = BACKWARD
            made.total.backward()
    if failed:
        return Replay(watch.seen[:forward], failed)
    norm = nn.utils.get_total_norm(it.grad for it in model.hypernet.parameters() if it.grad is not None)
    return Replay(watch.seen, not bool(norm.isfinite()))


def measure(x: Tensor) -> Values:
    """Measure what a tensor of floating-point values holds; the host waits for the device."""
    x = x.detach()
    if not x.numel():
        return Values(None, None)
    low, high = (float(it) for it in x.aminmax())  # NaN where there is one
    if math.isfinite(low) and math.isfinite(high):
        return Values(low, high)  # without copies: some of these tensors fill the memory
    finite = x.isfinite()
    rest, nan = x[finite], int(x.isnan().sum())
    ends = [float(it) for it in rest.aminmax()] if rest.numel() else [None, None]
    first = tuple((~finite).nonzero()[0].tolist())
    return Values(ends[0], ends[1], nan, int((~finite).sum()) - nan, first)


def split_contexts(batch: PackedBatch) -> list[PackedBatch]:
    """Cut a packed row, on the CPU, into one for each of its contexts."""
    chunks, queries = batch.chunks.joined(batch.n_ctx_chunks).lengths, batch.contexts.lengths
    columns = {
        **{name: getattr(batch, name).split(chunks, 1) for name in ("ctx_ids", "ctx_position_ids")},
        **{name: getattr(batch, name).split(queries, 1) for name in ("input_ids", "position_ids", "labels")},
    }
    parts, start = [], 0
    for index, record in enumerate(batch.record_ids):
        counts: dict[str, Any] = {"n_ctx_chunks": (batch.n_ctx_chunks[index],), "n_queries": (batch.n_queries[index],)}
        tensors = {name: pieces[index] for name, pieces in columns.items()}
        bare = PackedBatch(**tensors, **counts, logprobs_vals=None, logprobs_indices=None, record_ids=(record,))
        end = start + len(bare.label_positions)
        teacher = {
            name: None if (values := getattr(batch, name)) is None else values[start:end]
            for name in ("logprobs_vals", "logprobs_indices")
        }
        parts.append(PackedBatch(**_fields_of(bare) | teacher))
        start = end
    return parts


def _fields_of(batch: PackedBatch) -> dict[str, Any]:
    """Return the fields of a batch by name, without what is computed of them."""
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


class _Watch(ExitStack):
    """Hooks on every module of a model, for as long as the context is open."""

    def __init__(self, model: DocToLora) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.phase = DOCUMENT
        self._latest: dict[nn.Module, Any] = {}  # the handle of the hook that sees a module's output last
        bound = {module for modules in model.targets.values() for module in modules}
        for name, module in model.named_modules():
            self.callback(
                module.register_forward_pre_hook(partial(self._before, name, module in bound), with_kwargs=True).remove
            )
            if module in bound:
                self.callback(module.register_forward_hook(partial(self._without_lora, name)).remove)
        for name, parameter in model.hypernet.named_parameters(prefix="hypernet"):
            owner, _, own = name.rpartition(".")
            self.callback(parameter.register_hook(partial(self._gradient, owner, own)).remove)
        self.callback(self._remove_latest)

    def _remove_latest(self) -> None:
        for handle in self._latest.values():
            handle.remove()

    def see(self, module: str, tensor: str, x: Tensor) -> None:
        """Note what a tensor holds."""
        self.seen.append(Seen(self.phase, module, tensor, measure(x)))

    def _before(self, name: str, bound: bool, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """See inputs that are not finite, and give this module an alias of each, whose gradient is its own alone."""
        if name == "hypernet":
            self.phase = HYPERNETWORK if self.phase == DOCUMENT else self.phase
        # the hook that adds a LoRA is registered when it is bound: what sees the sum has to be registered after it
        if module in self._latest:
            self._latest.pop(module).remove()  # its forward was left by an exception, as the encoder's is
        label = "output with its LoRA" if bound and self.phase == QUESTION else "output"
        self._latest[module] = module.register_forward_hook(partial(self._after, name, label))

        def alias(x: Any, place: str) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or "mask" in place:
                return x
            if self.phase != BACKWARD and not (values := measure(x)).finite:
                self.seen.append(Seen(self.phase, name, f"input {place}", values))
            if not x.requires_grad or not torch.is_grad_enabled():
                return x
            x = x.view_as(x)
            x.register_hook(partial(self._gradient, name, f"input {place}"))
            return x

        args = tuple(alias(x, str(place)) for place, x in enumerate(args))
        return args, {key: alias(x, key) for key, x in kwargs.items()}

    def _without_lora(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """See the output of a LoRA's target before the delta is added to it."""
        for place, x in _tensors(output):
            if self.phase == QUESTION:
                self.see(name, f"output of the base{place}", x)

    def _after(self, name: str, label: str, module: nn.Module, args: Any, output: Any) -> None:
        """See an output, and its gradient when that arrives."""
        if module in self._latest:
            self._latest.pop(module).remove()
        for place, x in _tensors(output):
            if self.phase != BACKWARD:  # where modules are run again, as their forward was
                self.see(name, f"{label}{place}", x)
            if x.requires_grad:
                x.register_hook(partial(self._gradient, name, f"{label}{place}"))
        if name == "hypernet" and self.phase == HYPERNETWORK:
            self.phase = QUESTION

    def _gradient(self, name: str, label: str, gradient: Tensor) -> None:
        self.see(name, f"gradient of {label}", gradient)


def _tensors(x: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in a module's output, each with where it lies: a Lora's as ` A.q_proj`."""
    if isinstance(x, Tensor):
        if x.is_floating_point():
            yield place, x
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from _tensors(value, f"{place}.{key}" if place else f" {key}")
    elif isinstance(x, tuple | list):
        for index, value in enumerate(x):
            yield from _tensors(value, f"{place} {index}" if index else place)
    elif is_dataclass(x):  # a Lora
        yield from _tensors({field.name: getattr(x, field.name) for field in fields(x)}, place)
