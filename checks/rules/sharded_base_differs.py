"""A base that is sharded over processes computes what one does that each of them holds whole, and each holds its share.

What it does
------------
Where the configuration says `base_sharding: full`: writes the twin's base to disk, loads it in two forked processes of one group
on this machine's CPU, once whole in each and once sharded, and takes two steps with each.

Why it matters
--------------
A sharded base exists for one who cannot hold it whole, and who has nothing to compare it with. Shares that did not arrive,
buffers that no file holds, or a head that is tied to embeddings of another unit make a base that answers nonsense under a
falling loss. Layers that are gathered together, or stay so behind their pass, take the memory that sharding was to save.

How it is detected
------------------
Losses and gradient norms of both steps, and the hypernetwork's weights behind them, must be those over the whole base. Before
and after the steps a process may hold two thirds of the base's parameters at most, which are as many as the whole base has; when
a layer runs, that layer alone whole, but for a weight that embeddings and head share; and none may take a gradient. Skipped where
a process cannot be forked.

How to fix
----------
Load with `d2l.base.sharding.load_sharded_base`: it sends every tensor from the first process, computes buffers in each, and lets
a layer's weights go behind its forward and its backward.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from checks.faults import override
from checks.implementation import Implementation
from checks.processes import GroupError, in_group
from checks.quiet import quiet_transformers
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import build_drawn, changed
from checks.training.group_steps import (
    NO_GROUP,
    PER_PROCESS,
    PLAN,
    PROCESSES,
    STEPS,
    TOLERANCE,
    Taken,
    can_form_group,
    first_difference,
    taken,
)
from checks.training.steps import guarded_config, loss_rows
from d2l.base.attention import FLASH_4
from d2l.base.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.implementation import Stepper
    from checks.subject import Subject

LARGEST_SHARE = 2 / 3  # of two processes: a half, and what is rounded up
AT_ONCE = 1  # part that may be whole when a layer runs: that layer
MOVED = 1e-5  # of weights in float32, which a step moves by a thousandth
# Settings under which nothing stands in its way.
SHARDED = {"base_sharding": "full", "expert_weights": "dequantize", "quantize_ctx_encoder": False}
REMEDY = "load it with d2l.base.sharding.load_sharded_base"


@dataclass(frozen=True)
class Held:
    """What a process saw of a base.

    Attributes:
        values: of all parameters, in every process together.
        shares: of them, that it held before and after the steps.
        parts: layers, and embeddings and head where they are two, that were whole at once, at most, when a layer ran, and all.
        trainable: parameters that take a gradient.
    """

    steps: Taken
    values: int
    shares: tuple[float, float]
    parts: tuple[int, int]
    trainable: tuple[str, ...]


def check(subject: "Subject") -> Result:
    """Compare steps over a sharded base with steps over a whole one, in the same processes."""
    if subject.config.base_sharding == "none":
        return Pass("base_sharding: none: each process holds the whole base")
    if not can_form_group():
        return Skip(NO_GROUP)
    with tempfile.TemporaryDirectory(prefix="d2l-") as place:
        folder = Path(place) / "base"
        _write_base(subject, folder)
        ways = _ways(subject, folder)
        try:
            members = in_group(lambda: [_held(subject, load) for load in ways], PROCESSES)
        except GroupError as failure:
            return _finding("two processes cannot train over a sharded base", f"{STEPS} steps", str(failure))
    evidence: dict[str, Any] = {}
    for rank, (expected_of, found) in enumerate(members):
        evidence[f"process {rank}"] = {
            "whole": expected_of.steps.numbers,
            "sharded": found.steps.numbers,
            "shares": found.shares,
            "parts at once": found.parts[0],
        }
        if difference := first_difference(found.steps, expected_of.steps, MOVED):
            expected = f"losses, norms and weights as over a whole base, within {TOLERANCE:g}"
            actual = f"process {rank}, {difference}"
            return _finding("a sharded base is not the whole one", expected, actual, evidence)
        if unlike := _unlike_a_share(found, expected_of.values):
            return _finding(*unlike, evidence)
    return Pass(f"{STEPS} steps over shares of {1 / PROCESSES:.0%} are those over the whole base", evidence)


def _unlike_a_share(held: Held, values: int) -> tuple[str, str, str] | None:
    """Return in what a process does not hold a frozen share, what was expected and what was found; None where it does.

    Args:
        values: of all parameters of the whole base.
    """
    if held.values != values:
        return "a sharded base has other weights than the whole one", f"{values:,} values", f"{held.values:,}"
    if held.trainable:
        actual = f"{len(held.trainable)} do; first: {held.trainable[0]}"
        return "a sharded base is not frozen", "no parameter that takes a gradient", actual
    for when, share in zip(("before", "after"), held.shares, strict=True):
        if share > LARGEST_SHARE:
            return "the base is not sharded", f"about {1 / PROCESSES:.0%} of it", f"{share:.0%} {when} the steps"
    most, parts = held.parts
    if most > AT_ONCE:
        actual = f"{most} of {parts} layers, embeddings and head whole at once"
        return "too much of a sharded base is gathered at once", "the layer that runs", actual
    return None


def _write_base(subject: "Subject", folder: Path) -> None:
    """Write the twin's base as a checkpoint of its family."""
    base = subject.twin_base()
    if subject.twin_plan.experts.value == "dense":
        with quiet_transformers():
            base.save_pretrained(folder)
    else:
        subject.implementation.save_base(base, folder)


def _ways(subject: "Subject", folder: Path) -> "list[Callable[[], PreTrainedModel]]":
    """Return what loads the base whole, and what does in shares; what is not offered is missed here, not in a forked process."""
    it = subject.implementation
    whole, sharded, *_ = it.load_base, it.load_sharded_base, it.build, it.trainer_in_group
    own = {"attn_implementation": "auto"} if subject.config.attn_implementation == FLASH_4 else {}  # no CPU runs it
    config = changed(subject.twin_config, model_name_or_path=str(folder), **own)
    return [partial(whole, folder, subject.twin_plan), partial(sharded, config)]


def _trainer(subject: "Subject", base: "PreTrainedModel") -> "Stepper":
    """Make a trainer of this process around a base."""
    config = changed(guarded_config(subject), **PLAN, gradient_accumulation_steps=PER_PROCESS)
    model = build_drawn(subject.implementation, base, config, seed=0)
    return subject.implementation.trainer_in_group(model, loss_rows(subject), config)


def _held(subject: "Subject", load: Callable[[], "PreTrainedModel"]) -> Held:
    """Take the steps in this process of a group."""
    base = load()
    trainer, before = _trainer(subject, base), _share(base)
    with _layers_counted(base) as counts:
        steps = taken(trainer)
    trainable = tuple(name for name, it in base.named_parameters() if it.requires_grad)
    values = sum(it.numel() for it in base.parameters())
    return Held(steps, values, (before, _share(base)), (max(counts), len(_parts(base))), trainable)


def _parts(base: "PreTrainedModel") -> list[nn.Module]:
    """Return the layers, and embeddings and head where they have not one weight, which is needed from first to last.

    What d2l takes for its units is judged by this, and not asked.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    return [*decoder_layers(base), *([] if embeddings.weight is head.weight else [embeddings, head])]


@contextmanager
def _layers_counted(base: "PreTrainedModel") -> Iterator[list[int]]:
    """Note whenever a layer runs how many parts this process holds whole."""
    parts, counts = _parts(base), list[int]()

    def count(module: nn.Module, inputs: Any) -> None:
        counts.append(sum(not any(isinstance(it, DTensor) for it in part.parameters()) for part in parts))

    hooks = [layer.register_forward_pre_hook(count) for layer in decoder_layers(base)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _share(base: nn.Module) -> float:
    """Return the share of the base's parameters that this process holds."""
    held = [it.to_local() if isinstance(it, DTensor) else it for it in base.parameters()]
    return sum(it.numel() for it in held) / sum(it.numel() for it in base.parameters())


def _finding(message: str, expected: str, actual: str, evidence: dict[str, Any] | None = None) -> Fail:
    return Fail(message=message, expected=expected, actual=actual, remedy=REMEDY, evidence=evidence or {})


def _held_whole(healthy: Implementation, config: Any) -> Any:
    """Let every process read the whole base for itself."""
    return healthy.load_sharded_base(changed(config, base_sharding="none"))


def _spoilt(spoil: Callable[[Any], None]) -> Any:
    """Make a fault of loading a base and doing something to it."""

    def load_sharded_base(healthy: Implementation, config: Any) -> Any:
        base = healthy.load_sharded_base(config)
        with torch.no_grad():
            spoil(base)
        return base

    return override(load_sharded_base=load_sharded_base).under(**SHARDED)


def _shares_lost(base: Any) -> None:
    """Leave the last process's shares as they were allocated."""
    if distributed.get_rank() == PROCESSES - 1:
        for parameter in base.parameters():
            parameter.to_local().zero_()


def _rotary_lost(base: Any) -> None:
    """Leave buffers that are in no file as they were allocated."""
    for buffer in base.buffers():
        buffer.zero_()


def _left_trainable(base: Any) -> None:
    """Let the base's weights take gradients, which are reduced over processes and kept."""
    base.requires_grad_(True)


def _kept_gathered(when: str) -> Any:
    """Let every layer keep the weights that it has gathered for its forward, or for its backward."""

    def spoil(base: Any) -> None:
        for layer in decoder_layers(base):
            getattr(layer, f"set_reshard_after_{when}")(False)

    return _spoilt(spoil)


RULE = Rule(
    code="BAS203",
    name="sharded-base-differs",
    stage="twin",
    severity="error",
    sources=(
        "failure mode C28",
        "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html",
    ),
    requires=("BAS101", "QNT201", "GRD206"),
    check=check,
    faults=(
        Fault(
            "held-whole",
            "every process holds the whole base",
            override(load_sharded_base=_held_whole).under(**SHARDED),
        ),
        Fault("shares-lost", "the last process's shares do not arrive", _spoilt(_shares_lost)),
        Fault("rotary-lost", "buffers that no file holds are not computed", _spoilt(_rotary_lost)),
        Fault("left-trainable", "the base is not frozen", _spoilt(_left_trainable)),
        Fault("kept-from-forward", "layers stay whole until their backward", _kept_gathered("forward")),
        Fault("kept-from-backward", "layers stay whole behind the step", _kept_gathered("backward")),
    ),
)
