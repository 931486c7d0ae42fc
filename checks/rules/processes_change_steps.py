"""Two processes take the steps that one takes with as many micro-batches.

What it does
------------
Lets the run's own trainer take two steps of a light twin in one process, four micro-batches each, and in two forked processes of
one group, two micro-batches each, on this machine's CPU.

Why it matters
--------------
Several GPUs are what most runs are rented. Gradients that are not summed, or of the first micro-batch alone, losses that every
process divides by its own counts, processes that read the same rows: the loss falls in each case, and the run is one on a
fraction of its data, at another learning rate, or several runs that drift apart.

How it is detected
------------------
In float64, losses and gradient norms of both processes and their weights after the last step must be those of the one process.
The weights with which a run begins must be the same in both, to the last bit.
Skipped where a process cannot be forked: with CUDA, within a group of processes or a daemon, or by this operating system.

How to fix
----------
Deal the micro-batches of a step out by rank, divide losses by counts of the whole step, and sum gradients over processes after
the last of them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from checks.faults import override
from checks.implementation import Implementation
from checks.processes import GroupError, in_group
from checks.result import Fail, NotOffered, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.group_steps import (
    NO_GROUP,
    PER_PROCESS,
    PLAN,
    PROCESSES,
    STEPS,
    TOLERANCE,
    can_form_group,
    first_difference,
    taken,
)
from checks.training.steps import guarded_config, hypernet_values, light_base, light_model, loss_rows

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

LAYERS = 1  # what processes share is a step, however deep the base
MOVED = 1e-6  # of weights in float64, which a step moves by a thousandth
REMEDY = "deal micro-batches out by rank, divide by counts of the whole step, and sum gradients over processes"


def check(subject: "Subject") -> Result:
    """Compare the steps of two processes with those of one."""
    if not can_form_group():
        return Skip(NO_GROUP)
    alone = taken(_trainer(subject, subject.implementation.trainer, PROCESSES * PER_PROCESS))
    in_several = subject.implementation.trainer_in_group
    begin = _beginning(subject)
    try:
        begun, members = zip(
            *in_group(lambda: (begin(), taken(_trainer(subject, in_several, PER_PROCESS))), PROCESSES), strict=True
        )
    except GroupError as failure:
        return _finding("two processes cannot train together", f"{STEPS} steps", str(failure))
    for rank, weights in enumerate(begun):
        if other := [name for name, weight in weights.items() if not torch.equal(weight, begun[0][name])]:
            actual = f"process {rank}: {other[0]}, first of {len(other)} parameters that are others than in process 0"
            return _finding("two processes begin with different hypernetworks", "equal weights in both", actual)
    evidence: dict[str, Any] = {"alone": alone.numbers}
    for rank, member in enumerate(members):
        evidence[f"process {rank}"] = member.numbers
        if difference := first_difference(member, alone, MOVED):
            return _differs(f"process {rank}, {difference}", evidence)
    return Pass(
        f"{STEPS} steps of {PROCESSES} processes are those of one with {PROCESSES} times the micro-batches", evidence
    )


def _beginning(subject: "Subject") -> Callable[[], dict[str, Tensor]]:
    """Return what gives the weights with which a run begins in a process; none where the implementation does not say."""
    try:
        initial = subject.implementation.initial
    except NotOffered:
        return dict
    base, config = light_base(subject, LAYERS), guarded_config(subject, LAYERS)
    return lambda: hypernet_values(initial(base, config))


def _trainer(subject: "Subject", make: Callable[..., "Stepper"], micro_batches: int) -> "Stepper":
    """Make a trainer of so many micro-batches a step, in the run's own optimizer."""
    own = guarded_config(subject, LAYERS)
    config = changed(own, **PLAN, gradient_accumulation_steps=micro_batches)
    return make(light_model(subject, config, layers=LAYERS), loss_rows(subject), config)


def _differs(actual: str, evidence: dict[str, Any]) -> Fail:
    expected = (
        f"losses, norms and weights of one process with {PROCESSES} times the micro-batches, within {TOLERANCE:g}"
    )
    return _finding("the steps of two processes are not those of one", expected, actual, evidence)


def _finding(message: str, expected: str, actual: str, evidence: dict[str, Any] | None = None) -> Fail:
    return Fail(message=message, expected=expected, actual=actual, remedy=REMEDY, evidence=evidence or {})


def _alone(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Let every process train by itself."""
    return healthy.trainer(model, rows, config)


def _own_order(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Let every process draw an order of the rows of its own, so that some are read twice and some by none."""
    return healthy.trainer_in_group(model, rows, changed(config, seed=config.seed + distributed.get_rank()))


def _mean_taken(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Take the mean over processes of gradients whose losses are divided by counts of all, as DistributedDataParallel does."""
    for parameter in model.hypernet.parameters():
        parameter.register_hook(lambda gradient: gradient / PROCESSES)
    return healthy.trainer_in_group(model, rows, config)


def _too_many_taken(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Let every process take all micro-batches of a step of one."""
    several = {"gradient_accumulation_steps": PROCESSES * config.gradient_accumulation_steps}
    return healthy.trainer_in_group(model, rows, changed(config, **several))


def _drawn_by_rank(healthy: Implementation, base: Any, config: Any) -> Any:
    """Let every process of a group begin with weights of its own."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return healthy.initial(base, changed(config, seed=config.seed + rank))


RULE = Rule(
    code="GRD206",
    name="processes-change-steps",
    stage="twin",
    severity="error",
    sources=("failure mode C28", "failure mode 11"),
    requires=("OPT202", "LSS202", "LSS203", "OPT203", "EPO201"),
    check=check,
    faults=(
        Fault("each-alone", "every process trains by itself", override(trainer_in_group=_alone)),
        Fault("drawn-by-rank", "every process begins with its own weights", override(initial=_drawn_by_rank)),
        Fault("own-order", "every process draws its own order of rows", override(trainer_in_group=_own_order)),
        Fault("mean-taken", "gradients are means over processes, not sums", override(trainer_in_group=_mean_taken)),
        Fault(
            "too-many-taken", "every process takes the micro-batches of all", override(trainer_in_group=_too_many_taken)
        ),
    ),
)
