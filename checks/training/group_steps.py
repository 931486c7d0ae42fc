"""Steps of a run in the processes of a group, and how they differ from the same steps taken otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import current_process
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from checks.processes import can_fork
from checks.training.steps import hypernet_values

if TYPE_CHECKING:
    from checks.implementation import Stepper

PROCESSES, STEPS, PER_PROCESS = 2, 2, 2  # and micro-batches that each process takes in a step
TOLERANCE = 1e-5  # of losses and norms, which are summed in float32, and in another order
# Rows are micro-batches by themselves, three an epoch: what the processes read in a step is never the same.
PLAN: dict[str, Any] = {"learning_rate": 1e-3, "max_grad_norm": 0.1, "gen_lora_l1_reg_coef": 0.1, "loss": "ce"}
PLAN |= {"max_packed_inp_len": 17, "max_packed_ctx_len": 9}
NO_GROUP = "no process can be forked here: CUDA, a group of processes, or this system does not allow it"


def can_form_group() -> bool:
    """Tell whether processes can be forked here that are a group of their own."""
    return can_fork() and not distributed.is_initialized() and not current_process().daemon


@dataclass(frozen=True)
class Taken:
    """What the steps gave: loss and gradient norm of each, and the hypernetwork's parameters by name behind the last."""

    numbers: Sequence[tuple[float, float]]
    weights: dict[str, Tensor]


def taken(trainer: "Stepper") -> Taken:
    """Take the steps."""
    metrics = [trainer.step() for _ in range(STEPS)]
    return Taken([(it.task_loss, it.grad_norm) for it in metrics], hypernet_values(trainer.model))


def first_difference(found: Taken, expected: Taken, moved: float) -> str:
    """Return the first step or parameter that differs, and by how much; empty where none does.

    Args:
        moved: by which a parameter may differ behind the last step.
    """
    for step, (ours, theirs) in enumerate(zip(found.numbers, expected.numbers, strict=True), start=1):
        for name, own, other in zip(("loss", "gradient norm"), ours, theirs, strict=True):
            if not abs(own / other - 1) <= TOLERANCE:
                return f"step {step}: {name} {own:.6g} instead of {other:.6g}"
    for name, weight in expected.weights.items():
        error = float((found.weights[name] - weight).abs().max())
        if not error <= moved:
            return f"{name} is {error:.2g} off after {STEPS} steps"
    return ""
